"""Padding that the ids of tokens show: an embedding with a ``padding_idx`` gets it at the ends of samples."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import MaskSource, TracedMask
from lightning_otrt.reading.calls import Call, is_ids

__all__ = ["PADDING_IDX", "padded_ids"]

#: Stands in the place of an argument: no argument holds this mask.
PADDING_IDX = "padding_idx"


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
    count = is_padding.sum(1)
    at_ends = _leading(is_padding) + _leading(is_padding.flip(1))
    is_certain = ((count == at_ends) | is_padding.all(1)).all() & (count != count[:1]).any() & (count > 1).any()
    if not bool(is_certain):
        return None
    source = MaskSource(call.name, PADDING_IDX, "valid")
    return TracedMask(source, tuple(ids.shape), padded=int((count > 0).sum()))


def _leading(values: Tensor) -> Tensor:
    """How many elements of each row are true before the first that is not."""
    return values.long().cumprod(1).sum(1)
