"""Padding that the values of inputs show where no argument has the name of a mask: for warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import MaskSource, TracedMask
from lightning_otrt.reading.calls import Call, is_ids, is_tensor
from lightning_otrt.reading.mask_names import is_mask_name, names_other_mask
from lightning_otrt.reading.masks import as_rows

__all__ = ["padded_arguments", "padded_ids"]


def padded_ids(call: Call) -> TracedMask | None:
    """What the ids of an embedding show of padding ``(B, T)``; None where nothing is padded, or it is not certain.

    It is padding where the ``padding_idx`` stands at the ends of samples alone, in one of them at least twice, and more
    often in some than in others: a token that starts the sequence of each decoder may have the same id. It waits
    for the device, in the traced forward only.

    Args:
        call: The call of a layer.

    Example:
        >>> import torch
        >>> embed, ids = nn.Embedding(9, 2, padding_idx=0), torch.tensor([[4, 2, 0], [3, 0, 0], [5, 1, 2]])
        >>> padded_ids(Call("embed", embed, {"input": ids})).padded
        2
    """
    module, ids = call.module, call.sequence
    if not isinstance(module, nn.Embedding) or module.padding_idx is None or ids is None or not is_ids(ids):
        return None
    is_padding = ids == module.padding_idx
    is_at_ends = _is_at_ends(is_padding) & (is_padding.sum(1) > 1).any()
    return _shown(is_padding, MaskSource(call.name, "padding_idx", "valid"), "ids") if bool(is_at_ends) else None


def padded_arguments(call: Call) -> tuple[TracedMask, ...]:
    """What the arguments of a forward show of padding ``(B, T)``: flags that no name tells, and NaN.

    Flags are booleans, or floats of 0 and 1, that are the same up to some position of each sample and different behind
    it, but not in all samples alike. It waits for the device, in the traced forward only.

    Args:
        call: The call of the whole network.

    Example:
        >>> import torch
        >>> pad = torch.tensor([[False, False, True], [False, True, True]])
        >>> call = Call("", nn.Identity(), {"x": torch.ones(2, 3, 8), "pad": pad})
        >>> [(mask.source.argument, mask.padded) for mask in padded_arguments(call)]
        [('pad', 2)]
    """
    found = []
    for name, value, kind in _values(call.arguments):
        source = MaskSource(call.name, name, "unknown", call.method)
        flags = _flags(value)
        if flags is not None and not is_mask_name(name) and not names_other_mask(name):
            if bool(_is_at_ends(flags) | _is_at_ends(~flags)):
                found.append(_shown(flags, source, kind))
        elif value.dim() == 3 and value.is_floating_point():
            is_padding = value.isnan().all(2)
            if bool(_is_at_ends(is_padding)):
                found.append(_shown(is_padding, source, "nan"))
    return tuple(found)


def _values(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, str]]:
    """Tensors with their names, also those in a list or tuple, and the kind of warning of flags there."""
    for name, value in arguments.items():
        if is_tensor(value):
            yield name, value, "unknown"
        elif isinstance(value, (list, tuple)):
            # The fields of a named tuple are arguments by themselves.
            items = () if hasattr(value, "_fields") else enumerate(value)
            yield from ((f"{name}[{place}]", item, "inside") for place, item in items if is_tensor(item))


def _flags(value: Tensor) -> Tensor | None:
    """A tensor of flags ``(B, T)`` as booleans; None for anything else."""
    rows = as_rows(value)
    if rows is None or rows.numel() == 0 or rows.is_complex():
        return None
    if rows.dtype == torch.bool:
        return rows
    if not rows.is_floating_point() or not bool(((rows == 0) | (rows == 1)).all()):
        return None
    return rows == 1


def _is_at_ends(is_padding: Tensor) -> Tensor:
    """Whether flags ``(B, T)`` stand at the ends of samples alone, or all over them, and not in each alike."""
    count = is_padding.sum(1)
    at_ends = _leading(is_padding) + _leading(is_padding.flip(1))
    return ((count == at_ends) | is_padding.all(1)).all() & (count != count[:1]).any()


def _leading(values: Tensor) -> Tensor:
    """How many elements of each row are true before the first that is not."""
    return values.long().cumprod(1).sum(1)


def _shown(is_padding: Tensor, source: MaskSource, kind: str) -> TracedMask:
    return TracedMask(source, tuple(is_padding.shape), padded=int(is_padding.any(1).sum()), shown_by=kind)
