"""Tensor operations in the fastest form that memory layout, batching and device allow, and in sufficient precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = [
    "add_product",
    "all_nonzero",
    "common_dtype",
    "count_bad",
    "decay_into",
    "dot",
    "expanded",
    "finite",
    "is_long",
    "joined",
    "lacks_float64",
    "matrix_vector",
    "means",
    "norms",
    "observation_count",
    "product",
    "subtract_product",
    "widen_if_long",
    "widest",
    "without_autocast",
    "zero_unless",
]

#: Above so many observations a sum in float32 loses digits that a correlation needs.
FLOAT64_OBSERVATIONS = 100_000
#: Types of devices without float64.
WITHOUT_FLOAT64 = ("mps",)


def common_dtype(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, or both in float64 if either is."""
    if y.dtype == x.dtype == torch.float32:
        return y, x
    dtype = torch.promote_types(torch.promote_types(y.dtype, x.dtype), torch.float32)
    return y.to(dtype), x.to(dtype)


def is_long(y: Tensor) -> bool:
    """Whether neurons ``(..., N, n)`` have too many observations for sums in float32."""
    return y.shape[-1] > FLOAT64_OBSERVATIONS


def joined(views: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The neurons of both sides over the observations of all views.

    Example:
        >>> y, x = joined([(torch.ones(3, 4), torch.ones(2, 4)), (torch.ones(3, 5), torch.ones(2, 5))])
        >>> y.shape, x.shape
        (torch.Size([3, 9]), torch.Size([2, 9]))
    """
    if len(views) == 1:
        return views[0]
    y, x = (torch.cat(side, -1) for side in zip(*views, strict=True))
    return y, x


def widen_if_long(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Neurons in the :func:`widest` type if they have too many observations for sums in float32, else unchanged."""
    return (y.to(widest(y)), x.to(widest(x))) if is_long(y) else (y, x)


def lacks_float64(tensor: Tensor) -> bool:
    """Whether the device of the tensor has no float64, as Apple GPUs (MPS)."""
    return tensor.device.type in WITHOUT_FLOAT64


def widest(tensor: Tensor) -> torch.dtype:
    """Float64, or float32 where the device of the tensor has none."""
    return torch.float32 if lacks_float64(tensor) else torch.float64


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Switches autocast off for the device of the tensor. Where it is off, this costs less than doing so again."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@torch.no_grad()
def count_bad(before: Tensor | None, total: Tensor) -> Tensor:
    """How many totals were not finite, up to now, without a wait for the device.

    Args:
        before: The number of earlier ones, which is added to in place; None at the first.
        total: A value.

    Example:
        >>> count_bad(count_bad(None, torch.tensor(1.0)), torch.tensor(float("inf")))
        tensor(1)
    """
    is_bad = (total - total) != 0  # NaN for an infinite one, too; `isfinite` would take four operations
    if before is None:
        return is_bad.long()
    # The student may have been moved since.
    return before.to(is_bad.device).add_(is_bad)


def all_nonzero(values: Tensor) -> bool:
    """True only if every value is known to be nonzero. Always False off the CPU, where checking would stall the host.

    Example:
        >>> all_nonzero(torch.tensor([1.0, 2.0])), all_nonzero(torch.tensor([1.0, 0.0]))
        (True, False)
    """
    return values.device.type == "cpu" and bool(values.all())


def expanded(condition: Tensor, like: Tensor) -> Tensor:
    """A value for each of a batch ``(...)``, with as many dimensions as ``like`` ``(..., N, M)``."""
    return condition[(..., *(None,) * (like.dim() - condition.dim()))]


def zero_unless(condition: Tensor, *tensors: Tensor) -> Iterator[Tensor]:
    """Each tensor, set to zero in place where the boolean ``condition`` of each of a batch is false.

    Values that are not finite become zero, too, which a product with ``condition`` alone would leave as NaN.
    """
    if all_nonzero(condition):
        return iter(tensors)
    rejected = condition.logical_not()
    return (tensor.masked_fill_(expanded(rejected, tensor), 0.0) for tensor in tensors)


def finite(values: Tensor) -> Tensor:
    """Whether each value is finite, in two operations; ``isfinite`` takes four."""
    return (values - values) == 0


def decay_into(total: Tensor, factor: Tensor, new: Tensor) -> Tensor:
    """``total * factor + new``, in place of ``total``, which may have a wider type."""
    return torch.addcmul(new, total, factor, out=total)


def product(matrix: Tensor, x: Tensor, like: Tensor | None = None) -> Tensor:
    """``matrix @ x`` in the memory layout of ``like``: row operations on mixed layouts are ten times slower."""
    if like is not None and like.mT.is_contiguous():
        return (x.mT @ matrix.mT).mT
    return matrix @ x


def matrix_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix @ vector`` for each of a batch, with ``mv`` where possible: it takes half the time of ``bmm``."""
    if matrix.dim() == 2:
        return matrix.mv(vector)
    if matrix.shape[0] == 1:
        return matrix[0].mv(vector[0])[None]
    return torch.bmm(matrix, vector[..., None]).squeeze(-1)


def means(y: Tensor) -> Tensor:
    """Means ``(..., N, 1)`` of neurons ``(..., N, n)``; 0 where there are no observations, and torch gives NaN."""
    return y.mean(-1, keepdim=True) if y.shape[-1] else y.new_zeros((*y.shape[:-1], 1))


def norms(y: Tensor) -> Tensor:
    """Norms ``(..., N)`` of neurons ``(..., N, n)``, in one pass if each neuron is contiguous."""
    return torch.linalg.vector_norm(y, dim=-1) if y.stride(-1) == 1 else torch.linalg.vecdot(y, y).sqrt_()


def add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1) -> Tensor:
    """``total + alpha * left @ right``, in place."""
    return total.baddbmm_(left, right, alpha=alpha) if total.dim() == 3 else total.addmm_(left, right, alpha=alpha)


def subtract_product(total: Tensor, matrix: Tensor, x: Tensor) -> Tensor:
    """``total - matrix @ x``, in place."""
    if total.dim() == 3 and not total.is_contiguous():
        return total.sub_(product(matrix, x, like=total))
    return add_product(total, matrix, x, alpha=-1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ_ij a_ij b_ij of two matrices, or of each pair of a batch; both have the same memory layout."""
    if a.mT.is_contiguous():
        a, b = a.mT, b.mT
    return torch.linalg.vecdot(a.flatten(-2), b.flatten(-2))


def observation_count(y: Tensor) -> Tensor:
    """Number of observations of neurons ``(..., N, n)``, once for each of a batch ``(...)``."""
    return y.new_full(y.shape[:-2], y.shape[-1])
