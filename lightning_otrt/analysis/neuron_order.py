"""Orders of neurons in which a transport plan is close to a diagonal matrix."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["diagonal_mass", "matched_order"]


def matched_order(plan: Tensor) -> tuple[Tensor, Tensor]:
    """Orders of the rows and of the columns that bring the large entries of a plan to the diagonal.

    Only the wider side is reordered; the other side keeps the order that it has in its network.

    Args:
        plan: P, ``(N, M)``.

    Returns:
        Indices ``(N,)`` and ``(M,)``.

    Example:
        >>> import torch
        >>> matched_order(torch.tensor([[0.0, 0.0, 0.5], [0.25, 0.25, 0.0]]))
        (tensor([0, 1]), tensor([2, 0, 1]))
    """
    rows, columns = plan.shape
    if columns >= rows:
        return torch.arange(rows), _order_by_partner(plan.T)
    return _order_by_partner(plan), torch.arange(columns)


def diagonal_mass(plan: Tensor) -> tuple[float, float]:
    """Share of a plan's mass near its diagonal, and what that share is on average over all orders of the neurons.

    Near are cells within a fortieth of the side, and those that the diagonal itself runs through.

    Args:
        plan: P, ``(N, M)``.

    Example:
        >>> import torch
        >>> diagonal_mass(torch.eye(4) / 4)
        (1.0, 0.25)
    """
    rows, columns = plan.shape
    places = [(torch.arange(size, device=plan.device) + 0.5) / size for size in (rows, columns)]
    near = (places[0][:, None] - places[1]).abs() <= max(0.025, 0.5 / min(rows, columns))
    return float(plan[near].sum() / plan.sum()), float(near.float().mean())


def _order_by_partner(shares: Tensor) -> Tensor:
    """Order of the rows by the column of their largest entry; rows with the same column by their mean column."""
    partner = shares.argmax(1)
    mean = shares @ torch.arange(shares.shape[1], dtype=shares.dtype) / shares.sum(1)
    order = mean.argsort(stable=True)
    return order[partner[order].argsort(stable=True)]
