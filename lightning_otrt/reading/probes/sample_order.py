"""Which axis holds the samples, and whether a network puts them in another order: both show on a permuted batch."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.neurons.outputs import all_tensors
from lightning_otrt.reading.probes.profiles import Inputs, is_close, mapped, profiles

__all__ = ["rolled", "settle_order"]


def settle_order(model: nn.Module, traced: Trace, inputs: Inputs, method: str, input_axis: int = 0) -> Trace:
    """The trace with axes of the samples that do not depend on sizes, and with the layers that reorder samples.

    Where a sequence has as many positions as the batch has samples, sizes do not tell ``(T, B, C)`` from ``(B, T, C)``,
    or from ``(k * B, T, C)`` with k windows or views of each sample. In this case, and where the network may sort its
    samples by their lengths, it runs twice more: on these inputs, and on the same with the last sample first. Others
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
    has_lengths = any(tensor.dim() == 1 and not tensor.is_floating_point() for tensor in tensors)
    # Where the first input holds no samples, such as a hidden state of so many layers, nothing may have moved at all.
    first_input = next((tensor for tensor in tensors if tensor.dim() > 0), None)
    is_moved = (
        first_input is not None
        and not first_input.is_nested
        and first_input.shape[min(input_axis, first_input.dim() - 1)] == traced.batch_size
    )
    # A part of the network that takes (T, B, C) makes those around it look alike, where they transpose the sequences.
    may_transpose = is_moved and any(_has_axis(tensor, 1 - input_axis) for tensor in _tensors_of(traced))
    if traced.batch_size < 2 or not (
        unclear or has_lengths or may_transpose or any(layer.role == "recurrent" for layer in traced.layers)
    ):
        return traced
    try:
        first, second = (
            profiles(model, traced, given, method)
            for given in (InputGuard().copied(inputs), rolled(inputs, traced.batch_size, input_axis))
        )
    except Exception:  # these samples cannot stand in another order: the sizes have to tell
        return replace(traced, unclear_axes=tuple(sorted(unclear)))
    layers, reordered, still = [], [], []
    for layer in traced.layers:
        sides: dict[str, TracedTensor | None] = {"": layer.output, INPUT: layer.input}
        for suffix, tensor in sides.items():
            name = layer.name + suffix
            if tensor is None or name not in first or name not in second:
                continue
            axes = [axis for axis in (0, 1) if _follows(first[name], second[name], axis, traced.batch_size)]
            if _is_unclear(tensor, traced) and axes != [0, 1]:
                still += [] if axes else [name]
                sides[suffix] = tensor = replace(tensor, batch_axis=axes[0] if axes else tensor.batch_axis)
            elif is_moved and len(tensor.shape) == 3 and axes == [1 - tensor.batch_axis]:
                sides[suffix] = tensor = replace(tensor, batch_axis=axes[0])
            if is_moved and _is_reordered(first[name], second[name], tensor.batch_axis, traced.batch_size):
                reordered.append(name)
        layers.append(replace(layer, output=sides[""], input=sides[INPUT], parts=_parts(layer, sides[""])))
    return replace(traced, layers=tuple(layers), reordered=tuple(reordered), unclear_axes=tuple(still))


def _tensors_of(traced: Trace) -> list[TracedTensor]:
    """All that enters and leaves the layers."""
    return [tensor for layer in traced.layers for tensor in (layer.input, layer.output) if tensor is not None]


def _has_axis(tensor: TracedTensor, axis: int) -> bool:
    return len(tensor.shape) == 3 and tensor.batch_axis == axis


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

    def roll(tensor: Tensor) -> Tensor:
        if tensor.is_nested or not tensor.dim():
            return tensor
        place = axis if tensor.dim() > 1 and tensor.shape[axis] == samples else 0
        return tensor.roll(1, place) if tensor.shape[place] == samples else tensor

    return mapped(inputs, roll, lambda items: [items[-1], *items[:-1]] if len(items) == samples else items)


def _follows(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], axis: int, samples: int) -> bool:
    """Whether the samples lie along an axis: there the last one came first, with all its rows or in each group."""
    one, other = first[axis], second[axis]
    if len(one) % samples:
        return False
    return is_close(one.roll(len(one) // samples), other) or is_close(one.view(-1, samples).roll(1, 1).flatten(), other)


def _is_reordered(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], axis: int, samples: int) -> bool:
    """Whether a tensor holds the same samples in another order than the inputs."""
    one, other = first[axis], second[axis]
    is_same = len(one) == samples and is_close(one.sort().values, other.sort().values)
    return is_same and not _follows(first, second, axis, samples)
