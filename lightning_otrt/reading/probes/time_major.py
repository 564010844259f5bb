"""Whether a network takes ``(B, T, ...)`` or ``(T, B, ...)``, whatever stands inside of it: samples do not mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.containers import all_tensors
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.probes.profiles import is_close, mapped, profiles
from lightning_otrt.reading.traced.arguments import Inputs
from lightning_otrt.reading.traced.batch_facts import is_sequence_first

__all__ = ["find_sample_axis"]

#: Home of types that pass their sequence on as it is, to parts with a ``batch_first``.
_OF_TORCH = nn.Transformer.__module__


def find_sample_axis(model: nn.Module, traced: Trace, inputs: Inputs, method: str) -> int | None:
    """The axis of the sequences that enter a network which holds the samples; None where that is known or not shown.

    Two axes of an input are the same in an output, and nothing else tells which holds the samples: a network with a
    ``batch_first=False`` inside may transpose its sequences before that part and after it. Then the network runs on
    inputs whose first index along the first axis is replaced by the second one. Where what it gives at other indices
    stays the same, these are samples. Where it changes, and does not for the second axis, that one holds them.
    Networks of Hugging Face, and those with ``batch_first=True``, cost nothing.

    Args:
        model: The whole model.
        traced: The trace of one forward.
        inputs: Arguments of the root, not used by another forward before.
        method: Method of the root that is called in place of its forward.
    """
    target = named_layers(model)[traced.root]
    is_declared = is_sequence_first(target)
    has_own = isinstance(getattr(target, "batch_first", None), bool) or type(target).__module__ == _OF_TORCH
    if is_declared is False or has_own:
        return None
    entered = [tensor for tensor in all_tensors(inputs) if not tensor.is_nested]
    sizes = _sizes(traced, entered)
    if _is_hugging_face(target) or (sizes is None and _share_first_axis(traced, entered)):
        return 0 if is_declared else None
    if sizes is None:
        return None
    try:
        first = profiles(model, traced, InputGuard(clones=True).copied(inputs), method)
        for axis in (0, 1):
            changed = profiles(model, traced, _replaced(inputs, sizes, axis), method)
            if not _differ(first, changed):  # the first two are equal, as in a batch of zeros: nothing is shown
                return None
            if _is_independent(first, changed, traced, sizes, axis):
                return axis
    except torch.OutOfMemoryError:
        raise
    except Exception:  # these samples cannot be replaced: the sizes have to tell
        return None
    return None


def _share_first_axis(traced: Trace, entered: Sequence[Tensor]) -> bool:
    """Whether all that enters and leaves has one size along the first axis."""
    sizes = {tensor.shape[0] for tensor in entered if tensor.dim() > 1}
    sizes |= {shape[0] for shape in traced.output_shapes if shape}
    return bool(traced.output_shapes) and len(sizes) == 1


def _sizes(traced: Trace, entered: Sequence[Tensor]) -> tuple[int, int] | None:
    """The two axes that inputs share with what the network gives; None where there are no such axes."""
    given = {shape[:2] for shape in traced.output_shapes if len(shape) == 3}
    given |= {layer.output_shape[:2] for layer in traced.layers if layer.output_shape and len(layer.output_shape) == 3}
    pairs = (tuple(tensor.shape[:2]) for tensor in entered if tensor.dim() in (2, 3))
    found = next((pair for pair in pairs if pair in given and min(pair) > 1), None)
    return None if found is None else (found[0], found[1])


def _is_hugging_face(target: nn.Module) -> bool:
    """Whether the network, or one inside of it, is one of Hugging Face: these take samples first."""
    return any(isinstance(getattr(type(module), "main_input_name", None), str) for module in target.modules())


def _replaced(inputs: Inputs, sizes: tuple[int, int], axis: int) -> Inputs:
    """The inputs with a copy of the second index in place of the first, along one of the two axes.

    Only in tensors of both axes: what belongs to samples may stay as it is, and positions must.
    """

    def replace(tensor: Tensor) -> Tensor:
        found = tensor if tensor.is_nested else tensor.clone()
        if not tensor.is_nested and tuple(tensor.shape[:2]) == sizes:
            found.select(axis, 0).copy_(tensor.select(axis, 1))
        return found

    return mapped(inputs, replace)


def _place(shape: tuple[int, ...], sizes: tuple[int, int], axis: int) -> int | None:
    """Where a tensor has one of the two axes."""
    if shape[:2] == sizes:
        return axis
    if shape[:2] == sizes[::-1]:
        return 1 - axis
    return 0 if shape and shape[0] == sizes[axis] else None


def _differ(first: Mapping[str, tuple[Tensor, Tensor]], changed: Mapping[str, tuple[Tensor, Tensor]]) -> bool:
    """Whether the replacement changed anything."""
    return any(
        not is_close(one, other)
        for name in first.keys() & changed.keys()
        for one, other in zip(first[name], changed[name], strict=True)
    )


def _is_independent(
    first: Mapping[str, tuple[Tensor, Tensor]],
    changed: Mapping[str, tuple[Tensor, Tensor]],
    traced: Trace,
    sizes: tuple[int, int],
    axis: int,
) -> bool:
    """Whether the other indices along an axis are as before in all that the network makes of both axes."""
    compared = False
    for name in first.keys() & changed.keys():
        tensor = traced.tensor(name)
        if tensor is None or len(tensor.shape) not in (2, 3):
            continue
        place = _place(tensor.shape, sizes, axis)
        is_similarity = tensor.shape == (sizes[axis], sizes[axis])  # of all samples to all, as in contrastive learning
        if place is None or is_similarity:
            continue
        compared = True
        if not is_close(first[name][place][1:], changed[name][place][1:]):
            return False
    return compared
