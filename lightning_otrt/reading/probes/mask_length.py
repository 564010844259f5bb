"""Masks of a network whose names do not tell what they mean, and which have another length than a layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import TracedMask
from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.masks.names import may_mark_padding
from lightning_otrt.reading.masks.padding_shapes import is_at_ends
from lightning_otrt.reading.masks.values import as_rows
from lightning_otrt.reading.probes.mask_owner import dependent
from lightning_otrt.reading.traced.arguments import Inputs, bound_arguments
from lightning_otrt.reading.traced.calls import is_tensor

__all__ = ["settle_lengths"]


def settle_lengths(model: nn.Module, traced: Trace, names: Iterable[str], inputs: Inputs, method: str = "") -> Trace:
    """The trace with such masks at the layers whose tokens come from the masked sequence, for a warning.

    A series loses its first positions where lags are cut off, and a convolution with a stride has fewer. Such a layer
    depends on the sequence that has the length of the mask, and on no other one: the tokens of an image that a text
    changes are those of the image. So where the root gets other sequences too, the network runs four times more.
    Latent vectors have no padding, and what looks at a memory is no part of it.

    Args:
        model: The whole model.
        traced: The trace of one forward.
        names: Names of the layers that are to be read, with ``":input"`` for what enters.
        inputs: Arguments of the root.
        method: Method of the root that is called in place of its forward.
    """
    if not any(_may_be_one(known) for known in traced.arguments):
        return traced
    args, kwargs = given = InputGuard(clones=True).copied(inputs)
    taken = bound_arguments(named_layers(model)[traced.root], tuple(args), kwargs, method or "forward")
    found: dict[str, TracedMask] = {}
    for known in (known for known in traced.arguments if _may_be_one(known) and _is_padded(known, taken)):
        tensors = [value for name, value in taken.items() if is_tensor(value) and "mask" not in name]
        owners = [value for value in tensors if known.shape in (value.shape[:2], (*value.shape[:1], *value.shape[2:]))]
        layers = dict(_layers_of_other_length(traced, names, known, owners))
        for name, tokens in layers.items():
            others = [value for value in tensors if not any(value is owner for owner in owners)]
            others = [value for value in others if value.dim() > 2 or tokens in value.shape[1:]]
            if _comes_from(model, traced, given, method, name, owners, others):
                source = replace(known.source, is_named=False)
                found.setdefault(name.removesuffix(INPUT), replace(known, source=source, shown_by="length"))
    return replace(
        traced,
        layers=tuple(
            replace(layer, masks=(*layer.masks, found[layer.name])) if layer.name in found else layer
            for layer in traced.layers
        ),
    )


def _may_be_one(known: TracedMask) -> bool:
    """Whether an argument may be a mask ``(B, T)`` of unknown meaning."""
    is_mask = may_mark_padding(known.source.argument) and not known.source.is_pairwise and known.shown_by == ""
    return is_mask and known.shape is not None and len(known.shape) == 2 and known.padded > 0


def _is_padded(known: TracedMask, taken: Mapping[str, Any]) -> bool:
    """Whether it marks the ends of some samples. It waits for the device, in the first step only."""
    rows = as_rows(taken.get(known.source.argument))
    return rows is not None and bool(is_at_ends(rows != 0) | is_at_ends(rows == 0))


def _layers_of_other_length(
    traced: Trace, names: Iterable[str], mask: TracedMask, owners: Sequence[Tensor]
) -> Iterator[tuple[str, int]]:
    """Layers ``(B, T, C)`` with another number of tokens than a mask, and this number."""
    # Networks that take the channels of a series as tokens have one for each.
    sizes = {size for owner in owners for size in owner.shape[1:]}
    for name in dict.fromkeys(names):
        layer, tensor = traced.layer(name), traced.tensor(name)
        if tensor is None or len(tensor.shape) != 3 or len(tensor.positions) != 1 or not owners or mask.shape is None:
            continue
        (tokens,) = tensor.positions
        is_of_samples = tensor.shape[tensor.batch_axis] == mask.shape[0]
        is_latent = tokens in traced.learned_tokens or layer.looks_at_memory
        is_other = not {tokens, tokens - traced.prefix_tokens} & {1, mask.shape[1], *sizes}
        if is_of_samples and is_other and not is_latent and not layer.has_own_mask:
            yield name, tokens


def _comes_from(
    model: nn.Module,
    traced: Trace,
    inputs: Inputs,
    method: str,
    name: str,
    owners: Sequence[Tensor],
    others: Sequence[Tensor],
) -> bool:
    """Whether a layer depends on some tensors among the inputs, and not on others."""
    if not others:
        return True
    try:
        own, other = (dependent(model, traced, inputs, changed, method) for changed in (owners, others))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the network cannot run again on these inputs: nothing is shown
        return False
    return name in own and name not in other
