"""Whether the mask of a network with several inputs is that of a layer: a change of the masked sequence shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import TracedMask
from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace, TracedLayer
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.probes.profiles import is_close, mapped, profiles
from lightning_otrt.reading.traced.arguments import Inputs, bound_arguments
from lightning_otrt.reading.traced.calls import is_ids, is_tensor

__all__ = ["dependent", "settle_masks"]


def settle_masks(model: nn.Module, traced: Trace, names: Iterable[str], inputs: Inputs, method: str = "") -> Trace:
    """The trace without masks of the root at layers that do not depend on the sequence which the mask belongs to.

    A vision tower may have as many patches as there are words, and code between its layers hides where its tokens come
    from. So where the root gets other inputs too, the network runs twice more: on these inputs, and on the same with
    the sequence of the mask rolled over the samples. Others cost nothing. Where another input is a sequence of the same
    length, the mask may be that of both, and is doubtful; so it is of several sequences of vectors, at layers that do
    not depend on all of them.

    Args:
        model: The whole model.
        traced: The trace of one forward.
        names: Names of the layers that are to be read, with ``":input"`` for what enters.
        inputs: Arguments of the root.
        method: Method of the root that is called in place of its forward.
    """
    layers = [traced.layer(name) for name in dict.fromkeys(names)]
    masked = [layer for layer in layers if _has_mask_of_root(layer, traced)]
    if not masked:
        return traced
    root = named_layers(model)[traced.root]
    args, kwargs = given = InputGuard(clones=True).copied(inputs)
    taken = bound_arguments(root, tuple(args), kwargs, method or "forward")
    tensors = [value for name, value in taken.items() if is_tensor(value) and "mask" not in name]
    shapes = {mask.shape for layer in masked for mask in layer.masks if _is_of_root(mask, traced)}
    fitting = [value for value in tensors if tuple(value.shape[:2]) in shapes]
    # Of words and vectors the words; of several vectors nothing tells.
    owners = [value for value in fitting if is_ids(value)][:1] or fitting
    others = [] if not owners else _other_inputs(tensors, owners[0])
    if not others or len(owners[0]) < 2:
        return traced
    try:
        depend = [dependent(model, traced, given, [owner], method) for owner in owners]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the network cannot run again on these inputs: nothing is shown
        return traced
    if not any(depend):
        return traced
    is_shared = any(other.shape[:2] == owners[0].shape[:2] for other in others)
    independent = {
        layer.name for layer in masked if not all(found & {layer.name, layer.name + INPUT} for found in depend)
    }
    return replace(
        traced,
        layers=tuple(
            _without(layer, traced, is_shared=is_shared) if layer.name in independent else layer
            for layer in traced.layers
        ),
    )


def dependent(model: nn.Module, traced: Trace, inputs: Inputs, changed: Sequence[Tensor], method: str) -> set[str]:
    """Names of the layers that change where some of the inputs are rolled over the samples.

    Args:
        model: The whole model.
        traced: The trace of one forward.
        inputs: Arguments of the root.
        changed: Those of their tensors that are rolled.
        method: Method of the root that is called in place of its forward.
    """
    ids = {id(tensor) for tensor in changed}
    rolled = mapped(inputs, lambda tensor: tensor.roll(1, 0) if id(tensor) in ids else tensor.clone())
    runs = InputGuard(clones=True).copied(inputs), rolled
    first, second = (profiles(model, traced, each, method) for each in runs)
    return {name for name in first.keys() & second.keys() if not is_close(first[name][0], second[name][0])}


def _has_mask_of_root(layer: TracedLayer, traced: Trace) -> bool:
    """Whether the nearest mask that was given is one of the root."""
    given = next((mask for mask in layer.masks if mask.shape is not None), None)
    return given is not None and _is_of_root(given, traced)


def _is_of_root(mask: TracedMask, traced: Trace) -> bool:
    return mask.source.module == traced.root and mask.shape is not None and not mask.source.is_of_target


def _other_inputs(tensors: Sequence[Tensor], sequence: Tensor) -> list[Tensor]:
    """Inputs beside a sequence that may have tokens of their own; types of its tokens, and the like, have none."""
    return [value for value in tensors if value is not sequence and value.dim() > 1 and not _is_fact(value, sequence)]


def _is_fact(value: Tensor, sequence: Tensor) -> bool:
    return not value.is_floating_point() and value.shape == sequence.shape[:2]


def _without(layer: TracedLayer, traced: Trace, *, is_shared: bool) -> TracedLayer:
    masks = (
        replace(mask, is_doubtful=True) if _is_of_root(mask, traced) else mask
        for mask in layer.masks
        if is_shared or not _is_of_root(mask, traced)
    )
    return replace(layer, masks=tuple(masks))
