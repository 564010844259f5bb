"""Moving the points around which running sums are taken.

Products are kept in float32. Those of two neurons whose means are r and q standard deviations from their references are
off by about r q · 6e-8, relative to their standard deviations. A teacher's means stay, but a student's drift, and a
neuron that fades may end thousands of its deviations from its first mean: its products with itself are lost, and a
regression on it fails. So the reference of a regression follows the means, at each solve. A cost matrix stands more:
its largest error is 4e-5 where means drift by 90 standard deviations, and 4e-3 at 900.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_otrt.transport.cost import Sums

__all__ = ["move_reference"]


def move_reference(sums: Sums, reference: tuple[Tensor, Tensor]) -> tuple[Sums, tuple[Tensor, Tensor]]:
    """The same sums around the means of the neurons, and those means.

    It is linear in the sums: where processes keep shares of them, each can move its own by the common reference.

    Args:
        sums: Count, Σ y, Σ x, Σ y², Σ x², then Σ y yᵀ if there are seven, and Σ y xᵀ, of deviations from ``reference``.
        reference: ``(..., N, 1)`` and ``(..., M, 1)``. Where the means are not finite it stays.

    Example:
        >>> import torch
        >>> from lightning_otrt.transport.orthogonal import OrthogonalAlignment
        >>> y, x = torch.randn(4, 50) + 3, torch.randn(5, 50) - 3
        >>> sums = OrthogonalAlignment().sums(y, x, (torch.zeros(4, 1), torch.zeros(5, 1)))
        >>> sums, reference = move_reference(sums, (torch.zeros(4, 1), torch.zeros(5, 1)))
        >>> torch.allclose(reference[0], y.mean(1, keepdim=True), atol=1e-5)
        True
    """
    count, sum_y, sum_x, squares_y, squares_x, *products = sums
    moved, shifts = [], []
    for side, total in zip(reference, (sum_y, sum_x), strict=True):
        mean = side + (total / count[..., None])[..., None].to(side.dtype)
        new = torch.where(mean.isfinite(), mean, side)
        moved.append(new)
        # The shift that was made: the reference is rounded, so it differs a little from the one that was asked for.
        shifts.append((new.to(total.dtype) - side.to(total.dtype)).squeeze(-1))
    count = count[..., None]
    shift_y, shift_x = shifts
    # Σ y yᵀ of the first of two products, Σ y xᵀ of the last.
    others = [(sum_y, shift_y), (sum_x, shift_x)][-len(products) :]
    new_products = [
        _less_outer(_less_outer(part, sum_y, shift), shift_y, total - count * shift)
        for part, (total, shift) in zip(products, others, strict=True)
    ]
    new_sums = [
        sums[0],
        sum_y - count * shift_y,
        sum_x - count * shift_x,
        squares_y - 2 * shift_y * sum_y + count * shift_y.square(),
        squares_x - 2 * shift_x * sum_x + count * shift_x.square(),
        *new_products,
    ]
    return new_sums, (moved[0], moved[1])


def _less_outer(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total - a bᵀ`` in one pass. Not by `baddbmm`: with TF32 a GPU rounds products of matrices more."""
    a, b = a.to(total.dtype), b.to(total.dtype)
    return total.addcmul(a[..., None], b[..., None, :], value=-1)
