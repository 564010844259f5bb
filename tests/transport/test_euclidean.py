"""The Euclidean costs: the floor of the gradient, scale and offset."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transport_problems import OBSERVATIONS, draw, draw_plan, matrix_of, oracle, value_of

from lightning_otrt.transport.cost import Cost
from lightning_otrt.transport.euclidean import EuclideanCost, SquaredEuclideanCost
from lightning_otrt.transport.named_costs import get_cost


@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-4, 1e-2])
def test_euclidean_floor_changes_the_gradient_only(distance: float) -> None:
    x = draw(5, OBSERVATIONS, seed=1)
    y = draw(6, OBSERVATIONS)
    y[0] = x[2]
    y[0, 0] += distance
    plan = draw_plan(6, 5)
    scale = float((x**2).mean() * OBSERVATIONS)
    # scipy's differences, not its Gram matrix, keep tiny distances exact.
    exact = torch.from_numpy(oracle("euclidean", y, x))
    value, gradient = value_of(EuclideanCost(), y, x, plan)
    assert value.item() == pytest.approx(float((plan * exact).sum()), abs=1e-8)
    weights = plan / exact.clamp_min(0.01 * exact.mean())
    expected = (weights[:, :, None] * (y[:, None] - x[None])).sum(1) / scale
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)
    assert (gradient.norm(dim=1) <= plan.sum(1) / scale**0.5 * (1 + 1e-9)).all()
    matched = torch.zeros(6, 5, dtype=torch.float64)
    matched[0, 2] = 0.2
    pull = value_of(EuclideanCost(), y, x, matched)[1]
    assert pull[1:].abs().max() == 0
    floor = 0.01 * float(exact.mean())
    reach = float(exact[0, 2])
    # Rounding gives two equal neurons a distance of about 1e-8, so the direction at zero is not exactly zero.
    assert pull[0].norm().item() == pytest.approx(0.2 / scale**0.5 * min(1.0, reach / floor), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("cost", [EuclideanCost(), SquaredEuclideanCost()])
def test_teacher_without_activity_has_no_scale(cost: Cost) -> None:
    y, x = draw(4, OBSERVATIONS), torch.zeros(3, OBSERVATIONS, dtype=torch.float64)
    power = 1 if isinstance(cost, EuclideanCost) else 2
    expected = (y.square().mean(1).sqrt() ** power)[:, None].expand(4, 3)
    torch.testing.assert_close(matrix_of(cost, y, x), expected)
    value, gradient = value_of(cost, y, x, draw_plan(4, 3))
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["euclidean", "sqeuclidean"])
def test_common_offset_of_all_neurons_costs_no_precision(name: str) -> None:
    y, x = torch.randn(5, 64), torch.randn(6, 64)
    offset = 1000 + 100 * torch.randn(64)
    expected = oracle(name, y + offset, x + offset)
    np.testing.assert_allclose(matrix_of(get_cost(name), y + offset, x + offset).numpy(), expected, rtol=1e-4)
