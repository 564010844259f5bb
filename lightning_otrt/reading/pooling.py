"""Average pooling of maps and sequences, deterministic also in the backward pass on CUDA."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pool", "pool_valid", "widened", "widened_copy"]

#: Up to so many positions one matrix product takes a third of the time of sums.
_SMALL_MAP = 64


def pool(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Average-pool the positions of ``(B, C, *positions)`` to ``sizes``, in float32 or wider.

    The windows are those of adaptive average pooling, whose backward pass is not deterministic on CUDA. So matrix
    products and sums are used instead.

    Args:
        x: ``(B, C, *positions)``.
        sizes: Number of positions to keep along each axis, at most the size of the axis.

    Returns:
        ``(B, C, *sizes)``, never ``x`` itself.

    Example:
        >>> pool(torch.tensor([[[1.0, 3.0, 5.0, 7.0]]]), (2,))
        tensor([[[2., 6.]]])
    """
    shape = tuple(x.shape[2:])
    if shape == tuple(sizes):
        return widened_copy(x)
    if math.prod(shape) <= _SMALL_MAP:
        x = widened(x)
        windows = functools.reduce(torch.kron, [_windows(*ends, x) for ends in zip(shape, sizes, strict=True)])
        return _product(x.flatten(2), windows).view(*x.shape[:2], *sizes)
    if any(size % target for size, target in zip(shape, sizes, strict=True)):
        x = widened(x)
        for axis, target in enumerate(sizes, start=2):
            if x.shape[axis] != target:
                windows = _windows(x.shape[axis], target, x)
                x = _product(x.movedim(axis, -1), windows).movedim(-1, axis)
        return x
    count = math.prod(x.shape[2:]) // math.prod(sizes)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Outer axes first: the backward pass then expands the gradient to the size of the whole map in its last step only.
    # Sums with one division at the end, since the backward pass of a mean divides a gradient of that size.
    for axis, target in enumerate(sizes, start=2):
        if x.shape[axis] != target:
            before, after = x.shape[:axis], x.shape[axis + 1 :]
            x = x.reshape(*before, target, x.shape[axis] // target, *after).sum(axis + 1, dtype=wide)
    return x / count


def pool_valid(x: Tensor, mask: Tensor, target: int) -> Tensor:
    """Average-pool the valid tokens of each sample to segments of equal length.

    Args:
        x: ``(B, C, T)``. Values where the mask is false may be anything, also not finite.
        mask: ``(B, T)``, true where a token is valid.
        target: Number of segments. A sample with fewer valid tokens has some of them in several segments.

    Returns:
        ``(B, C, target)``; zero for a sample without a valid token.
    """
    x = widened(x)
    valid = mask.to(torch.bool)
    length = valid.sum(1, keepdim=True).clamp_min(1)
    rank = (valid.cumsum(1) - 1)[:, :, None]
    cell = torch.arange(target, device=x.device)
    start, stop = cell * length // target, ((cell + 1) * length + target - 1) // target
    inside = ((rank >= start[:, None]) & (rank < stop[:, None]) & valid[:, :, None]).to(x.dtype)
    return _product(x.masked_fill(~valid[:, None], 0.0), inside / inside.sum(1, keepdim=True).clamp_min(1))


def widened(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it has that type; the tensor itself where nothing changes."""
    return x if x.dtype == torch.float64 else x.float()


def widened_copy(x: Tensor) -> Tensor:
    """The same, but never the tensor itself: the next layer may write to a layer's output in place."""
    wide = widened(x)
    return wide.clone() if wide is x else wide


def _product(x: Tensor, windows: Tensor) -> Tensor:
    """``x @ windows`` in the precision that both have. Autocast would lower it."""
    with torch.autocast(x.device.type, enabled=False):
        return x @ windows


def _windows(size: int, target: int, like: Tensor) -> Tensor:
    """``(size, target)`` matrix of adaptive average pooling, built on the device: a copy from the host would wait."""
    cell = torch.arange(target, device=like.device)
    start, stop = cell * size // target, ((cell + 1) * size + target - 1) // target
    position = torch.arange(size, device=like.device)[:, None]
    inside = ((position >= start) & (position < stop)).to(like.dtype)
    return inside / inside.sum(0)
