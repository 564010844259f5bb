"""Which axis of an output holds the neurons where sizes do not tell: a change inside of the module shows it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.containers import all_tensors
from lightning_otrt.reading.extra_forwards.evaluation import in_evaluation
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.neurons.outputs import output_items, sequence_output
from lightning_otrt.reading.probes.profiles import uneven
from lightning_otrt.reading.torch_internals import (
    add_forward_hook,
    add_forward_pre_hook,
    is_in_backward,
    is_in_functional_transform,
)
from lightning_otrt.reading.traced.arguments import Inputs
from lightning_otrt.reading.traced.axes import ShownAxes

__all__ = ["find_neuron_axes"]

#: Indices at which a change is so large a share of the largest one count as changed.
_SHARE = 0.2


def find_neuron_axes(model: nn.Module, traced: Trace, inputs: Inputs, method: str = "") -> ShownAxes:
    """The neuron axes of :attr:`Trace.guessed_axes`, None where the probe does not show one.

    A module that computes something behind its last inner layer, such as a sum or a transposition, returns a tensor
    that no layer made. Where two axes have the same size, its shape does not tell the two apart. So each of these
    modules runs three times more on what it got: as it is, and with the output of an inner layer, whose type tells the
    axis of its neurons, changed at one position and in one neuron. The change of a position arrives at one index of
    each axis but that of the neurons. Where positions are mixed, the change of a neuron arrives at one index of that.

    Other networks cost nothing.

    Args:
        model: The whole model.
        traced: The trace of one forward.
        inputs: Arguments of the root, not used by another forward before.
        method: Method of the root that is called in place of its forward.
    """
    found: dict[tuple[str, str | int], int | None] = {(name, key): None for name, key, _ in traced.guessed_axes}
    if not found:
        return found
    modules, inner = named_layers(model), {name: voter for name, _, voter in traced.guessed_axes}
    target, running = modules[traced.root], [False]
    given: dict[str, Inputs] = {}

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Before it runs: a decoder adds to the cache of keys that it is given.
        if not running[0] and not is_in_backward():
            given[name] = InputGuard(clones=True).copied((args, kwargs))

    def probe(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if running[0] or is_in_backward() or is_in_functional_transform():
            return
        axis = traced.layer(inner[name]).neuron_axis
        assert axis is not None
        running[0] = True
        try:
            runs = [_run(module, given[name], modules[inner[name]], change) for change in _changes(axis)]
        except torch.OutOfMemoryError:
            raise
        except Exception:  # it cannot run again on what it got: nothing is shown
            return
        finally:
            running[0] = False
        for key in set.intersection(*(set(run) for run in runs)):
            if (name, key) in found:
                found[name, key] = _axis(*(run[key] for run in runs))

    try:
        with in_evaluation(target, all_tensors(inputs)), ExitStack() as hooks:
            for name in inner:
                before, after = functools.partial(keep, name), functools.partial(probe, name)
                hooks.callback(add_forward_pre_hook(modules[name], before, with_kwargs=True).remove)
                hooks.callback(add_forward_hook(modules[name], after, with_kwargs=True).remove)
            args, kwargs = inputs
            (getattr(target, method) if method else target)(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the network cannot run again on these inputs
        return found
    return found


def _changes(axis: int) -> tuple[Callable[[Tensor], None], ...]:
    """What is done to the output of the inner layer, in place."""

    def nothing(output: Tensor) -> None:
        """The run that the others are compared with."""

    def position(output: Tensor) -> None:
        values = output.movedim(axis, -1)
        for size in values.shape[1:-1]:
            values = values.select(1, size // 2)
        values += _pattern(values, values.shape[-1])

    def neuron(output: Tensor) -> None:
        values = output.movedim(axis, -1)
        middle = values[..., values.shape[-1] // 2]
        middle += _pattern(values, middle[0].numel()).view(middle.shape[1:])

    return nothing, position, neuron


def _pattern(values: Tensor, count: int) -> Tensor:
    """A change as large as the values, another one at each index."""
    scale = values.float().square().mean().sqrt().clamp_min(1e-3)
    return (uneven(count, values.device) * scale).to(values.dtype)


def _run(
    module: nn.Module, inputs: Inputs, inner: nn.Module, change: Callable[[Tensor], None]
) -> dict[str | int, Tensor]:
    """What the module gives, by key, where the output of an inner layer is changed."""

    def changed(inner: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        output = output.clone()
        change(output)
        return output

    args, kwargs = InputGuard(clones=True).copied(inputs)
    handle = add_forward_hook(inner, changed)
    try:
        output = sequence_output(module, module(*args, **kwargs))
    finally:
        handle.remove()
    return {key: item.detach() for key, item in output_items(output) if isinstance(item, Tensor) and item.dim() > 2}


def _axis(before: Tensor, position: Tensor, neuron: Tensor) -> int | None:
    """The axis that the two changes show."""
    if not before.shape == position.shape == neuron.shape:
        return None
    at_position = set(range(1, before.dim())) - set(_single(before, position))
    if len(at_position) == 1:
        return at_position.pop()
    at_neuron = _single(before, neuron)
    return at_neuron[0] if len(at_neuron) == 1 else None


def _single(before: Tensor, after: Tensor) -> Sequence[int]:
    """The axes, samples aside, along which a change arrived at one index."""
    change = (after - before).float().abs()
    found = []
    for axis in range(1, before.dim()):
        along = change.movedim(axis, 0).flatten(1).amax(1)
        if before.shape[axis] > 1 and int((along > _SHARE * along.max()).sum()) == 1:
            found.append(axis)
    return found
