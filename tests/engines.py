"""Engines, neurons and calls that the tests of the steps floor share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lightning_otrt.steps.engine import TransportEngine
from lightning_otrt.steps.settings import TermSettings
from lightning_otrt.transport.named_costs import get_cost

COSTS = ("correlation", "euclidean", "sqeuclidean")
#: Costs of transport plans, and couplings that are none.
TERMS: dict[str, dict[str, Any]] = {
    **{cost: {"cost": cost, "plan": "sinkhorn"} for cost in COSTS},
    "orthogonal": {"cost": "correlation", "plan": "orthogonal"},
    "covariance": {"cost": "covariance", "plan": "orthogonal"},
    "random_orthogonal": {"cost": "correlation", "plan": "random_orthogonal"},
}


def make(cost: Any = "correlation", pairs: int = 1, **options: Any) -> TransportEngine:
    """An engine for pairs of equal weights that remembers nothing and solves every tenth call.

    Args:
        cost: A cost, or the name of one of :data:`TERMS`.
        pairs: Number of pairs.
        options: Other settings of the engine.
    """
    names = [(f"s{index}", f"t{index}") for index in range(pairs)]
    term = TERMS.get(cost, {"cost": cost, "plan": "sinkhorn"}) if isinstance(cost, str) else {"cost": cost}
    settings = term | options
    return TransportEngine(names, [1 / pairs] * pairs, TermSettings(get_cost(settings.pop("cost")), **settings))


def draw(
    rows: int = 12, columns: int = 9, observations: int = 40, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Neurons of a student, which need a gradient, and of a teacher."""
    generator = torch.Generator().manual_seed(seed)
    y, x = (torch.randn(size, observations, generator=generator).to(dtype) + 0.5 for size in (rows, columns))
    return y.requires_grad_(), x


def call(engine: TransportEngine, *pairs: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    """The term of a call with one view, each of whose observations is a sample."""
    return engine.term([list(pairs)], pairs[0][0].shape[1], **options)[0]


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """States of engines are equal to the last bit."""
    assert found["calls"] == expected["calls"]
    for own, other in zip(found["pairs"], expected["pairs"], strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


class OneRank:
    """The processes of a global batch of one process."""

    size, rank = 1, 0

    def sum(self, message: Any) -> Any:
        return copy.deepcopy(message)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def have_same(self, tensors: list[Tensor]) -> bool:
        return True
