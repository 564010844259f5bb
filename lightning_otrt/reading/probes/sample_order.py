"""Which axis holds the samples, and whether a network puts them in another order: both show on a permuted batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor
from lightning_otrt.reading.containers import all_tensors
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.probes.profiles import is_close, mapped, profiles
from lightning_otrt.reading.traced.arguments import Inputs

__all__ = ["follows", "roll", "rolled", "settle_order"]

#: Puts indices along an axis into other places.
_Move: TypeAlias = Callable[[Tensor, int], Tensor]
#: What :func:`profiles` gives.
_Profiles: TypeAlias = dict[str, tuple[Tensor, Tensor]]


def settle_order(model: nn.Module, traced: Trace, inputs: Inputs, method: str, input_axis: int = 0) -> Trace:
    """The trace with axes of the samples that do not depend on sizes, and with the layers that reorder samples.

    Where a sequence has as many positions as the batch has samples, sizes do not tell ``(T, B, C)`` from ``(B, T, C)``,
    or from ``(k * B, T, C)`` with k windows or views of each sample. In this case, and where the network may sort its
    samples by their lengths, it runs twice more: on these inputs, and on the same with the last sample first. If it
    fails on these, as one that takes samples sorted by length does, the last sample is replaced by the one before it.
    Where rows are put into other places by other means, such as a flip, the first two samples are exchanged. Others
    cost nothing.

    Args:
        model: The whole model.
        traced: The trace of one forward.
        inputs: Arguments of the root, not used by another forward before.
        method: Method of the root that is called in place of its forward.
        input_axis: The axis of the samples in inputs of two or more axes.
    """
    unclear = {
        layer.name for layer in traced.layers if any(_is_unclear(t, traced) for t in (layer.input, layer.output))
    }
    tensors = list(all_tensors(inputs))
    # Where the first input holds no samples, such as a hidden state of so many layers, nothing may have moved at all.
    first_input = next((tensor for tensor in tensors if tensor.dim() > 0), None)
    is_moved = (
        first_input is not None
        and not first_input.is_nested
        and first_input.shape[min(input_axis, first_input.dim() - 1)] == traced.batch_size
    )
    # A part of the network that takes (T, B, C) makes those around it look alike, where they transpose the sequences.
    may_transpose = is_moved and any(_has_axis(tensor, 1 - input_axis) for tensor in _tensors_of(traced))
    is_unclear = bool(unclear) or may_transpose or _may_sort(traced, tensors)
    if traced.batch_size < 2 or not (is_unclear or traced.may_reorder):
        return traced
    # After a flip or half a turn of the samples all have the same neighbours: these show where some samples stay.
    for move in (roll, _repeat_last) if is_unclear else (_exchange_first,):
        try:
            changed = _moved(inputs, traced.batch_size, input_axis, move)
            first, second = (
                profiles(model, traced, each, method) for each in (InputGuard(clones=True).copied(inputs), changed)
            )
        except torch.OutOfMemoryError:
            raise
        except Exception:  # these samples cannot stand in another order
            continue
        return _settled(traced, first, second, move, is_moved)
    # The sizes have to tell, where the module does not.
    modules = named_layers(model)
    told = {name for name in unclear if isinstance(getattr(modules[name], "batch_first", None), bool)}
    return replace(traced, unclear_axes=tuple(sorted(unclear - told)))


def _may_sort(traced: Trace, inputs: Sequence[Tensor]) -> bool:
    """Whether a network may sort its samples: it gets one number for each, or has a recurrent layer."""
    has_lengths = any(tensor.dim() == 1 and not tensor.is_floating_point() for tensor in inputs)
    return has_lengths or any(layer.role == "recurrent" for layer in traced.layers)


def _settled(traced: Trace, first: _Profiles, second: _Profiles, move: _Move, is_moved: bool) -> Trace:
    """The trace with what two forwards show.

    Args:
        traced: The trace.
        first: Profiles of the inputs as they are.
        second: Profiles of the inputs with samples in other places.
        move: How they were moved.
        is_moved: Whether the first input holds samples, so that these have moved.
    """
    layers, reordered, still = [], [], []
    for layer in traced.layers:
        sides: dict[str, TracedTensor | None] = {"": layer.output, INPUT: layer.input}
        for suffix, tensor in sides.items():
            name = layer.name + suffix
            if tensor is None or name not in first or name not in second:
                continue
            axes = [axis for axis in (0, 1) if follows(first[name], second[name], axis, traced.batch_size, move)]
            if _is_unclear(tensor, traced) and axes != [0, 1]:
                still += [] if axes else [name]
                sides[suffix] = tensor = replace(tensor, batch_axis=axes[0] if axes else tensor.batch_axis)
            elif is_moved and len(tensor.shape) == 3 and axes == [1 - tensor.batch_axis]:
                sides[suffix] = tensor = replace(tensor, batch_axis=axes[0])
            moved = first[name], second[name], tensor.batch_axis, traced.batch_size, move
            if is_moved and not _is_table(tensor) and _is_reordered(*moved):
                reordered.append(name)
        layers.append(replace(layer, output=sides[""], input=sides[INPUT], parts=_parts(layer, sides[""])))
    return replace(traced, layers=tuple(layers), reordered=tuple(reordered), unclear_axes=tuple(still))


def _tensors_of(traced: Trace) -> list[TracedTensor]:
    """All that enters and leaves the layers."""
    return [tensor for layer in traced.layers for tensor in (layer.input, layer.output) if tensor is not None]


def _has_axis(tensor: TracedTensor, axis: int) -> bool:
    return len(tensor.shape) == 3 and tensor.batch_axis == axis


def _is_table(tensor: TracedTensor) -> bool:
    """Whether a tensor ``(1, T, C)`` is the same for all samples, such as that of learned positions, also if B is T."""
    return len(tensor.shape) == 3 and tensor.shape[0] == 1


def _parts(layer: TracedLayer, output: TracedTensor | None) -> tuple[tuple[str | int, TracedTensor], ...]:
    if output is None or len(layer.parts) != 1:
        return layer.parts
    return ((layer.parts[0][0], output),)


def _is_unclear(tensor: TracedTensor | None, traced: Trace) -> bool:
    """Whether the sizes of a sequence do not tell which axis holds the samples."""
    samples = traced.batch_size
    if tensor is None or len(tensor.shape) != 3 or not samples:
        return False
    return tensor.shape[1] == samples and tensor.shape[0] % samples == 0


def rolled(inputs: Inputs, samples: int, axis: int) -> Inputs:
    """The inputs with the last sample first; a list of one number for each sample counts as a tensor."""
    return _moved(inputs, samples, axis, roll)


def _moved(inputs: Inputs, samples: int, axis: int, move: _Move) -> Inputs:
    """The inputs with other samples in some places."""

    def change(tensor: Tensor) -> Tensor:
        if tensor.is_nested or not tensor.dim():
            return tensor
        place = axis if tensor.dim() > 1 and tensor.shape[axis] == samples else 0
        return move(tensor, place) if tensor.shape[place] == samples else tensor

    return mapped(inputs, change, lambda items: change(torch.tensor(items)).tolist())


def roll(tensor: Tensor, axis: int) -> Tensor:
    """The last index first."""
    return tensor.roll(1, axis)


def _exchange_first(tensor: Tensor, axis: int) -> Tensor:
    """The first two indices exchanged."""
    first, second, rest = tensor.tensor_split((1, 2), axis)
    return torch.cat([second, first, rest], axis)


def _repeat_last(tensor: Tensor, axis: int) -> Tensor:
    """The last index but one in place of the last one, too, so that lengths in order stay in order."""
    size = tensor.shape[axis]
    return torch.cat([tensor.narrow(axis, 0, size - 1), tensor.narrow(axis, size - 2, 1)], axis)


def follows(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], axis: int, samples: int, move: _Move) -> bool:
    """Whether the samples lie along an axis: there they have moved, with all their rows or in each group."""
    one, other = first[axis], second[axis]
    if len(one) % samples:
        return False
    rows, groups = one.view(samples, -1), one.view(-1, samples)
    return is_close(move(rows, 0).flatten(), other) or is_close(move(groups, 1).flatten(), other)


def _is_reordered(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], axis: int, samples: int, move: _Move
) -> bool:
    """Whether a tensor holds the same samples in another order than the inputs."""
    one, other = first[axis], second[axis]
    is_same = len(one) == samples and is_close(one.sort().values, other.sort().values)
    return is_same and not follows(first, second, axis, samples, move)
