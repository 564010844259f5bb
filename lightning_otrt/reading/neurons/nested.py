"""Nested tensors, whose samples differ in length, as padded tensors with a mask."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lengths_mask", "pad_nested"]


def lengths_mask(lengths: Tensor, longest: int) -> Tensor:
    """``(B, longest)``, true at the first tokens of each sample."""
    return torch.lt(torch.arange(longest, device=lengths.device), lengths[:, None])


def pad_nested(value: Tensor, tokens: int | None) -> tuple[Tensor, Tensor]:
    """A nested tensor of samples ``(T_i, C)`` as ``(B, T, C)``, with the mask ``(B, T)`` of its own lengths.

    The fast path of ``nn.TransformerEncoder`` makes nested tensors of what its layers pass on.

    Args:
        value: The nested tensor.
        tokens: T, where the length of the batch is known; None: that of its longest sample.
    """
    lengths = [len(sample) for sample in value.unbind()]
    size = None if tokens is None else (len(lengths), max(tokens, *lengths), value.size(-1))
    padded = torch.nested.to_padded_tensor(value, 0.0, output_size=size)
    return padded, lengths_mask(torch.tensor(lengths, device=padded.device), padded.shape[1])
