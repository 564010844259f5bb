"""From the name of a cost to the cost."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_otrt.checks import shown
from lightning_otrt.transport.correlation import CorrelationCost, CovarianceCost
from lightning_otrt.transport.cost import Cost
from lightning_otrt.transport.custom_cost import CustomCost
from lightning_otrt.transport.euclidean import EuclideanCost, SquaredEuclideanCost

__all__ = ["COSTS", "get_cost"]

#: The costs that have a name.
COSTS: dict[str, type[Cost]] = {
    cost.name: cost for cost in (CorrelationCost, EuclideanCost, SquaredEuclideanCost, CovarianceCost)
}


def get_cost(cost: str | Callable[[Tensor, Tensor], Tensor] | Cost) -> Cost:
    """The cost of that name, or a user's function as a cost.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither a name nor callable.

    Example:
        >>> get_cost("sqeuclidean").name, list(COSTS)
        ('sqeuclidean', ['correlation', 'euclidean', 'sqeuclidean', 'covariance'])
    """
    if isinstance(cost, Cost):
        return cost
    if isinstance(cost, str):
        if cost not in COSTS:
            raise ValueError(
                f"Expected argument `cost` to be one of {list(COSTS)} or a callable, but got {shown(cost)}."
            )
        return COSTS[cost]()
    if callable(cost):
        return CustomCost(cost)
    raise TypeError(
        f"Expected argument `cost` to be one of {list(COSTS)} or a callable, but got {type(cost).__name__}."
    )
