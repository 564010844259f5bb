"""Generators of shared values run side by side."""

from __future__ import annotations

import pytest
import torch
from transport_problems import NAMES, draw, draw_plan, value_of

from lightning_otrt.steps.rounds import run_rounds
from lightning_otrt.transport.cost import Plan, Sums
from lightning_otrt.transport.named_costs import get_cost

PAIRS = [(get_cost(name), draw(4, 12, seed=3 * k), draw(5, 12, seed=3 * k + 1)) for k, name in enumerate(NAMES)]


@pytest.mark.parametrize("begun", [(), (0,), (1, 2)])
def test_one_reduction_a_round_for_all(begun: tuple[int, ...]) -> None:
    """Two processes that see the same: the value of one, and half its gradient each. Costs of 1 and 2 rounds mix."""
    plan = draw_plan(4, 5)
    reduced: list[int] = []

    def twice(sums: list[Sums]) -> list[Sums]:
        reduced.append(len(sums))
        return [[2 * tensor for tensor in one] for one in sums]

    rounds = [cost.shared_value(y, x, Plan.of(plan), cost.energy(x)) for cost, y, x in PAIRS]
    replies = [twice([next(each)])[0] if index in begun else None for index, each in enumerate(rounds)]
    reduced.clear()
    for (value, gradient), pair in zip(run_rounds(rounds, twice, replies), PAIRS, strict=True):
        expected_value, expected_gradient = value_of(*pair, plan)
        torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, expected_gradient / 2, rtol=1e-10, atol=1e-14)
    # The correlation, which is the first, takes two rounds, the others one.
    assert reduced == {(): [3, 1], (0,): [3], (1, 2): [1, 1]}[begun]


def test_nothing_to_run_reduces_nothing() -> None:
    assert run_rounds([], lambda sums: 1 / 0) == []
