"""One traced forward of a model: which modules ran, in what order, and what went in and out of each.

``trace_hooks.py`` has the hooks, and ``traced/axes.py`` tells along which axis the neurons lie. The model is the same
before and after: no random number used up, no statistic or flag changed, no hook left.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_otrt.layers.names import child_names, is_inside, named_layers, primary_names
from lightning_otrt.layers.trace import Trace
from lightning_otrt.random_numbers import random_state
from lightning_otrt.reading.containers import all_tensors, tensors_of_samples
from lightning_otrt.reading.extra_forwards.evaluation import in_evaluation
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.extra_forwards.own_gradients import own_gradients_explained
from lightning_otrt.reading.masks.search import MaskSearch
from lightning_otrt.reading.neurons.outputs import returned_tensors
from lightning_otrt.reading.probes.neuron_axis import find_neuron_axes
from lightning_otrt.reading.probes.random_outputs import is_random
from lightning_otrt.reading.probes.sample_order import settle_order
from lightning_otrt.reading.probes.time_major import find_sample_axis
from lightning_otrt.reading.torch_internals import add_forward_hook, add_forward_pre_hook
from lightning_otrt.reading.trace_hooks import TraceHooks
from lightning_otrt.reading.traced.arguments import Inputs, bound_arguments
from lightning_otrt.reading.traced.axes import ShownAxes, TracedAxes, shape_of
from lightning_otrt.reading.traced.batch_facts import (
    count_samples,
    has_lists_of_samples,
    input_samples,
    is_sequence_first,
)
from lightning_otrt.reading.traced.calls import ModuleCall
from lightning_otrt.reading.traced.states import without_states
from lightning_otrt.reading.traced.tokens import count_prefix_tokens, learned_tokens

__all__ = ["trace"]


def trace(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    root: str = "",
    method: str = "",
    values: bool = False,
) -> Trace:
    """Run one forward of ``root`` inside ``model`` and note what every module did.

    The forward runs without gradient and in evaluation mode; flags, buffers and the random number generators
    of CPU and CUDA are as before afterwards, also when it fails.

    Args:
        model: The whole model; names in the trace are relative to it.
        args: Positional arguments of the forward of ``root``.
        kwargs: Its keyword arguments.
        root: Name of the module to run, ``""`` for ``model`` itself.
        method: Name of its method to run in place of the module, such as ``"forward_features"``.
        values: Whether to look at values, for :attr:`TracedTensor.is_rectified`. This waits for the device.

    Returns:
        The trace. It includes modules outside ``root``, as modules that did not run.

    Raises:
        ValueError: If there is no module ``root``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> found = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (torch.randn(2, 3, 8, 8),))
        >>> found.layer("1").output_shape, found.layer("1").neuron_axis
        ((2, 4, 6, 6), 1)
    """
    found, spare = _trace(model, args, kwargs or {}, root, method, values)
    copies = InputGuard(clones=True)
    found = replace(found, is_random=is_random(model, found, copies.copied(spare), method))
    axis = find_sample_axis(model, found, copies.copied(spare), method)
    shown = find_neuron_axes(model, found, copies.copied(spare), method)
    declared = is_sequence_first(named_layers(model)[root])
    is_declared = axis is None or axis == int(declared or False)
    if shown or not is_declared:
        own_args, own_kwargs = copies.copied(spare)
        input_axis = None if is_declared else axis
        again, _ = _trace(model, own_args, own_kwargs, root, method, values, input_axis=input_axis, shown=shown)
        found = replace(again, is_random=found.is_random)
    if declared is not None:  # else the probe alone says it, which a choice of rows may mislead
        found = replace(found, sample_axis=0 if axis is None and not declared else axis)
    return settle_order(model, found, spare, method, input_axis=axis or 0)


def _trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    root: str,
    method: str,
    values: bool,
    input_axis: int | None = None,
    shown: ShownAxes | None = None,
) -> tuple[Trace, Inputs]:
    """The trace, and a copy of the inputs that no forward has used. Without axes these are what the types tell."""
    modules = named_layers(model)
    if root not in modules:
        children = ", ".join(map(repr, child_names(model))) or "none"
        raise ValueError(f"No module {root!r} in {type(model).__name__} to run. Its children: {children}.")
    primary = primary_names(modules, root)
    target = modules[root]
    inputs = list(all_tensors((tuple(args), dict(kwargs))))
    taken = bound_arguments(target, tuple(args), kwargs, method or "forward")
    call = ModuleCall(primary[id(target)], target, taken, method or "forward")
    spare = InputGuard(clones=True).copied((tuple(args), dict(kwargs)))
    counted = tensors_of_samples((tuple(args), dict(kwargs)))
    second = bool(is_sequence_first(target) if input_axis is None else input_axis)
    samples = count_samples(without_states(target, counted), [], sequence_first=input_axis == 1)
    axes = TracedAxes(samples, target if input_axis == 0 else None, shown)
    recorder = TraceHooks(inputs, axes, values)
    if method:  # no hook of the root tells that it runs
        recorder.enter(call)
    with in_evaluation(target, inputs) as generators, own_gradients_explained(target), ExitStack() as hooks:
        for name, module in modules.items():
            if primary[id(module)] == name and is_inside(name, root):
                before = add_forward_pre_hook(
                    module, functools.partial(recorder.before_forward, name), with_kwargs=True
                )
                hooks.callback(before.remove)
                after = add_forward_hook(module, functools.partial(recorder.after_forward, name))
                hooks.callback(after.remove)
        hooks.enter_context(recorder.flow)
        run = getattr(target, method) if method else target
        state = random_state(inputs, generators)
        output = run(*args, **kwargs)
        returned = returned_tensors(output)
        draws_random = random_state(inputs, generators) != state
        layers = tuple(
            recorder.layer(name, module, returned) for name, module in modules.items() if primary[id(module)] == name
        )
    has_lists = has_lists_of_samples((*args, *kwargs.values()), output)
    traced = Trace(
        layers=layers,
        root=primary[id(target)],
        aliases=tuple((name, primary[id(m)]) for name, m in modules.items() if primary[id(m)] != name),
        output_shapes=tuple(shape_of(tensor, None) for tensor in returned if tensor.is_floating_point()),
        batch_size=0 if has_lists else _count(target, counted, returned, sequence_first=second),
        # Images in a list have no axis of samples: their first axes are channels, or boxes.
        input_samples=frozenset() if has_lists else input_samples(counted),
        prefix_tokens=count_prefix_tokens(target),
        arguments=MaskSearch(inputs).named(call),
        shown_padding=recorder.padding.found(),
        learned_tokens=learned_tokens(target),
        guessed_axes=tuple((*place, inner) for place, inner in axes.guessed.items()),
        draws_random=draws_random,
        picked_positions=recorder.picked_positions,
    )
    return replace(traced, may_reorder=traced.batch_size in recorder.flow.moved_rows), spare


def _count(model: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, sequence_first: bool) -> int:
    """The number of samples of a forward."""
    kept = {id(tensor) for tensor in without_states(model, [*inputs, *outputs])}
    entered, left = ([tensor for tensor in tensors if id(tensor) in kept] for tensors in (inputs, outputs))
    return count_samples(entered, left, sequence_first=sequence_first)
