"""One traced forward of a model: which modules ran, in what order, and what went in and out of each.

``traced/axes.py`` tells along which axis the neurons lie. The model is the same before and after: no random number used
up, no statistic or flag changed, no hook left.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import TracedMask
from lightning_otrt.layers.names import child_names, is_inside, named_layers, primary_names
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor
from lightning_otrt.random_numbers import random_state
from lightning_otrt.reading.containers import all_tensors, as_container, tensors_of_samples
from lightning_otrt.reading.extra_forwards.evaluation import in_evaluation
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.extra_forwards.own_gradients import own_gradients_explained
from lightning_otrt.reading.masks.search import MaskSearch
from lightning_otrt.reading.masks.shown_padding import ShownPadding
from lightning_otrt.reading.neurons.outputs import (
    describe,
    output_items,
    packed_mask,
    returned_tensors,
    sequence_output,
)
from lightning_otrt.reading.probes.neuron_axis import find_neuron_axes
from lightning_otrt.reading.probes.random_outputs import is_random
from lightning_otrt.reading.probes.sample_order import settle_order
from lightning_otrt.reading.probes.time_major import find_sample_axis
from lightning_otrt.reading.torch_internals import (
    add_forward_hook,
    add_forward_pre_hook,
    is_in_backward,
    is_in_functional_transform,
)
from lightning_otrt.reading.traced.arguments import Inputs, bound_arguments, entered_tensor
from lightning_otrt.reading.traced.axes import Frame, ShownAxes, TracedAxes, has_children, shape_of
from lightning_otrt.reading.traced.batch_facts import (
    count_samples,
    has_lists_of_samples,
    input_samples,
    is_rectified,
    is_sequence_first,
)
from lightning_otrt.reading.traced.calls import ModuleCall
from lightning_otrt.reading.traced.flow import Flow
from lightning_otrt.reading.traced.module_types import role_of
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
    spare = InputGuard().copied((tuple(args), dict(kwargs)))
    counted = tensors_of_samples((tuple(args), dict(kwargs)))
    second = bool(is_sequence_first(target) if input_axis is None else input_axis)
    samples = count_samples(without_states(target, counted), [], sequence_first=input_axis == 1)
    axes = TracedAxes(samples, target if input_axis == 0 else None, shown)
    recorder = _TraceHooks(inputs, axes, values)
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
        input_samples=input_samples(counted),
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


class _TraceHooks:
    """The hooks of one traced forward, and what they noted."""

    def __init__(self, inputs: Sequence[Tensor], axes: TracedAxes, values: bool) -> None:
        self._values = values
        self._inputs = {id(tensor) for tensor in inputs}
        self._axes = axes
        self._search = MaskSearch(inputs)
        self.padding = ShownPadding()
        self.flow = Flow()
        self.picked_positions: dict[str, tuple[tuple[int, ...], ...]] = {}
        self._layers: dict[str, TracedLayer] = {}
        self._outputs: dict[str, list[Callable[[], Tensor | None]]] = {}
        self._completed = 0
        self._has_inner: list[bool] = []  # of the modules that are running

    def enter(self, call: ModuleCall) -> None:
        """The call of a method, inside of which all modules run."""
        self.padding.note(call)
        self._axes.enter(call, None, takes_model_input=False)

    def before_forward(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        # A forward that takes a gradient within it runs checkpointed layers once more, which is no second call.
        if is_in_backward():
            return
        taken = bound_arguments(module, args, kwargs)
        starts = any(id(value) in self._inputs for key, value in taken.items() if not key.endswith("mask"))
        self._axes.enter(ModuleCall(name, module, taken), entered_tensor(args, kwargs), takes_model_input=starts)
        self._has_inner.append(False)

    def after_forward(self, name: str, module: nn.Module, args: tuple[Any, ...], returned: Any) -> None:
        """Forward hook."""
        if is_in_backward():
            return
        frame = self._axes.leave(module)
        output = sequence_output(module, returned)
        tensors = [(key, value) for key, value in output_items(output) if isinstance(value, Tensor)]
        around = [running.call for running in reversed(self._axes.running)]
        masks = self._note_masks(frame, around, [value for _, value in tensors])
        length = next((mask.shape[1] for mask in masks if mask.shape is not None), None)
        traced = tuple((key, self._traced(frame, key, value, length)) for key, value in tensors)
        is_single = len(traced) == 1 and not isinstance(as_container(output), Mapping)
        known = self._layers.get(name)
        made_by = self._axes.source(tensors[0][1]) if is_single and has_children(module) else None
        reached_by = self._note_flow(name, frame, returned)
        self._note_picks(name, [value for _, value in tensors])
        self._note_picks(name + INPUT, [] if frame.input is None else [frame.input])
        self._layers[name] = TracedLayer(
            name=name,
            kind=type(module).__name__,
            order=self._completed,
            calls=known.calls + 1 if known else 1,
            input=None if frame.input is None else self._traced_input(frame, frame.input, length),
            output=traced[0][1] if is_single else None,
            output_kind=describe(output),
            parts=() if isinstance(returned, Tensor) else traced,
            input_shapes=tuple(
                tuple(value.shape) for value in all_tensors(frame.call.arguments) if not value.is_nested
            ),
            input_from=frame.source.layer if frame.source else None,
            output_from=made_by.layer if made_by is not None else name,
            takes_model_input=frame.takes_model_input,
            reached_by=reached_by | known.reached_by if known else reached_by,
            masks=masks,
            looks_at_memory=any(call.memories for call in (frame.call, *around)),
            in_transform=is_in_functional_transform(),
            has_own_mask=packed_mask(returned) is not None or any(value.is_nested for _, value in tensors),
        )
        # Of all its calls: a head that ran twice may return the output of the first.
        self._outputs.setdefault(name, []).extend(weakref.ref(value) for _, value in tensors)
        self._completed += 1
        for (_, value), (_, facts) in zip(tensors, traced, strict=True):
            self._axes.note(name, frame, value, facts)

    def layer(self, name: str, module: nn.Module, returned: Sequence[Tensor]) -> TracedLayer:
        """All that is known of a module after the forward, which returned these tensors."""
        layer = self._without_doubtful_axes(self._layers.get(name, TracedLayer(name, kind=type(module).__name__)))
        outputs = [reference() for reference in self._outputs.get(name, [])]
        is_returned = any(output is tensor for output in outputs if output is not None for tensor in returned)
        return replace(
            layer,
            is_container=has_children(module),
            role=role_of(module),
            gives_model_output=is_returned,
            has_weights=next(module.parameters(), None) is not None,
            is_graph=isinstance(module, (torch.fx.GraphModule, torch.jit.ScriptModule)),
        )

    def _note_masks(
        self, frame: Frame, around: Sequence[ModuleCall], outputs: Sequence[Tensor]
    ) -> tuple[TracedMask, ...]:
        """Note the padding that a call shows and the masks that it passes on; its own masks, if it has sequences."""
        self.padding.note(frame.call, around)
        if not has_children(frame.module):
            self._search.pass_on(frame.call, outputs, around)
        if any(value.dim() == 3 for value in (frame.input, *outputs) if value is not None):
            return self._search.masks([frame.call, *around])
        return ()

    def _note_flow(self, name: str, frame: Frame, returned: Any) -> frozenset[str]:
        """Note where the tensors of a call come from; the layers whose outputs reach its arguments."""
        reached_by = self.flow.sources(all_tensors(frame.call.arguments))
        if not self._has_inner.pop():
            has_weights = next(frame.module.parameters(), None) is not None
            self.flow.enter(all_tensors(returned), {name} if has_weights else {name, *reached_by})
        # What computes the weights of a layer, such as a spectral norm, is no layer inside of it.
        if self._has_inner and "parametrizations" not in name.split("."):
            self._has_inner[-1] = True
        return reached_by

    def _note_picks(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Note which positions of the samples what a layer gives, or gets, has."""
        found = [picked for tensor in tensors if (picked := self.flow.picks.positions(tensor))]
        if found:
            self.picked_positions[name] = found[0]

    def _without_doubtful_axes(self, layer: TracedLayer) -> TracedLayer:
        if layer.name + INPUT in self._axes.doubtful and layer.input is not None:
            layer = replace(layer, input=replace(layer.input, neuron_axis=None))
        if layer.name in self._axes.doubtful and layer.output is not None:
            parts = tuple((key, replace(part, neuron_axis=None)) for key, part in layer.parts)
            layer = replace(layer, output=replace(layer.output, neuron_axis=None), parts=parts)
        return layer

    def _traced_input(self, frame: Frame, value: Tensor, length: int | None) -> TracedTensor:
        shape = shape_of(value, length)
        return self._facts(value, shape, frame.input_axis, self._axes.batch_axis(frame, value, shape))

    def _traced(self, frame: Frame, key: str | int, value: Tensor, length: int | None) -> TracedTensor:
        shape = shape_of(value, length)
        axis = self._axes.neuron_axis(frame, key, value, shape)
        facts = self._facts(value, shape, axis, self._axes.batch_axis(frame, value, shape))
        source = self._axes.source(value) if has_children(frame.module) else None
        return facts if source is None else replace(facts, made_by=source.layer)

    def _facts(self, value: Tensor, shape: tuple[int, ...], neuron_axis: int | None, batch_axis: int) -> TracedTensor:
        dtype, is_floating = str(value.dtype).removeprefix("torch."), value.is_floating_point()
        looks = self._values and is_floating and value.numel() and not is_in_functional_transform()
        rectified = is_rectified(value) if looks else None
        return TracedTensor(shape, dtype, is_floating, neuron_axis, batch_axis, rectified)
