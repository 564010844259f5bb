"""Operations on neurons, by the fastest way that layout, batch and device allow, and in enough digits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = [
    "add_product",
    "are_all",
    "count_of",
    "dot",
    "in_enough_digits",
    "is_long",
    "matrix_vector",
    "norms",
    "only_if",
    "product",
    "pulled",
]

#: Above so many observations a float32 sum loses digits that a correlation needs.
FLOAT64_OBSERVATIONS = 100_000


def is_long(y: Tensor) -> bool:
    """Whether neurons ``(..., N, n)`` have too many observations for sums in float32."""
    return y.shape[-1] > FLOAT64_OBSERVATIONS


def in_enough_digits(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Neurons as they are, or in float64 where they are long."""
    return (y.double(), x.double()) if is_long(y) else (y, x)


def are_all(values: Tensor) -> bool:
    """Whether it is certain that no value is 0. A CPU is asked, which saves it passes; for a device nothing waits."""
    return values.device.type == "cpu" and bool(values.all())


def only_if(fits: Tensor, *parts: Tensor) -> Iterator[Tensor]:
    """Each part, or zeros where not ``fits``, in place; `where` would take ten times as long."""
    if are_all(fits):
        return iter(parts)
    return (part.nan_to_num_(0.0, 0.0, 0.0).mul_(fits) for part in parts)


def product(matrix: Tensor, x: Tensor, like: Tensor | None = None) -> Tensor:
    """``matrix @ x`` in the memory layout of ``like``: row operations on two layouts are ten times slower."""
    if like is not None and like.mT.is_contiguous():
        return (x.mT @ matrix.mT).mT
    return matrix @ x


def matrix_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix @ vector`` for each of a batch; not as a product of matrices, which is five times slower."""
    return matrix.mv(vector) if matrix.dim() == 2 else torch.bmm(matrix, vector[..., None]).squeeze(-1)


def norms(y: Tensor) -> Tensor:
    """Norms of neurons ``(..., N)``, in one pass where a neuron lies in one piece."""
    return torch.linalg.vector_norm(y, dim=-1) if y.stride(-1) == 1 else torch.linalg.vecdot(y, y).sqrt_()


def add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1) -> Tensor:
    """``total + alpha * left @ right``, in place."""
    return total.baddbmm_(left, right, alpha=alpha) if total.dim() == 3 else total.addmm_(left, right, alpha=alpha)


def pulled(pull: Tensor, matrix: Tensor, x: Tensor) -> Tensor:
    """``pull - matrix @ x``, in place."""
    if pull.dim() == 3 and not pull.is_contiguous():
        return pull.sub_(product(matrix, x, like=pull))
    return add_product(pull, matrix, x, alpha=-1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ_ij a_ij b_ij; both in one layout."""
    if a.mT.is_contiguous():
        a, b = a.mT, b.mT
    return torch.linalg.vecdot(a.flatten(-2), b.flatten(-2))


def count_of(y: Tensor) -> Tensor:
    """Number of observations, one for each of a batch."""
    return y.new_full(y.shape[:-2], y.shape[-1])
