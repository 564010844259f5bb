"""Average pooling of maps and sequences, deterministic also in the backward pass on CUDA."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Windows", "pool", "pool_valid", "widened", "widened_copy"]

#: Up to so many positions one matrix product takes a third of the time of sums.
_SMALL_MAP = 64
#: Matrices that are kept: a few for each layer, more only where images have many sizes.
_KEPT = 64


class Windows:
    """Matrices of pooling windows, made once for each shape, type and device: each takes some 20 kernels to make."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, shape: Sequence[int], sizes: Sequence[int], like: Tensor) -> Tensor:
        """The matrix ``(positions, positions that are kept)`` in the type and on the device of ``like``."""
        if torch.compiler.is_compiling():
            return _product_of_windows(shape, sizes, like)  # a constant there, and no memory of the graph's to keep
        key = (*shape, *sizes, like.dtype, like.device)
        if key not in self._made:
            if len(self._made) >= _KEPT:
                self._made.clear()
            # A validation runs in inference mode, whose tensors a later backward pass could not use.
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = _product_of_windows(shape, sizes, like)
        return self._made[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> Windows:
        """A copy makes its own."""
        return Windows()

    def __reduce__(self) -> tuple[Any, ...]:
        """Without the matrices."""
        return Windows, ()


def pool(x: Tensor, sizes: Sequence[int], windows: Windows | None = None) -> Tensor:
    """Average-pool the positions of ``(B, C, *positions)`` to ``sizes``, in float32 or wider.

    The windows are those of adaptive average pooling, whose backward pass is not deterministic on CUDA. So matrix
    products and sums are used instead.

    Args:
        x: ``(B, C, *positions)``.
        sizes: Number of positions to keep along each axis, at most the size of the axis.
        windows: Where matrices of windows are kept; None: nowhere.

    Returns:
        ``(B, C, *sizes)``, never ``x`` itself.

    Example:
        >>> pool(torch.tensor([[[1.0, 3.0, 5.0, 7.0]]]), (2,))
        tensor([[[2., 6.]]])
    """
    shape = tuple(x.shape[2:])
    if shape == tuple(sizes):
        return widened_copy(x)
    windows = windows or Windows()
    is_uneven = any(size % target for size, target in zip(shape, sizes, strict=True))
    # On a device a product is no faster than the sums, which need no matrix.
    if math.prod(shape) <= _SMALL_MAP and (is_uneven or x.device.type == "cpu"):
        x = widened(x)
        return _product(x.flatten(2), windows(shape, sizes, x)).view(*x.shape[:2], *sizes)
    if is_uneven:
        x = widened(x)
        for axis, target in enumerate(sizes, start=2):
            if x.shape[axis] != target:
                x = _product(x.movedim(axis, -1), windows((x.shape[axis],), (target,), x)).movedim(-1, axis)
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


def _product_of_windows(shape: Sequence[int], sizes: Sequence[int], like: Tensor) -> Tensor:
    """The matrix of windows of all axes."""
    return functools.reduce(torch.kron, [_windows(*ends, like) for ends in zip(shape, sizes, strict=True)])


def _windows(size: int, target: int, like: Tensor) -> Tensor:
    """``(size, target)`` matrix of adaptive average pooling, built on the device: a copy from the host would wait."""
    cell = torch.arange(target, device=like.device)
    start, stop = cell * size // target, ((cell + 1) * size + target - 1) // target
    position = torch.arange(size, device=like.device)[:, None]
    inside = ((position >= start) & (position < stop)).to(like.dtype)
    return inside / inside.sum(0)
