"""The correlation cost: dead neurons, rounding and large means."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transport_problems import OBSERVATIONS, draw, draw_plan, matrix_of, oracle, over_processes, value_of

from lightning_otrt.transport.correlation import CorrelationCost
from lightning_otrt.transport.cost import Plan
from lightning_otrt.transport.named_costs import get_cost

DEAD: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda noise: 0 * noise,
    "0.1": lambda noise: 0 * noise + 0.1,
    "-1234.567": lambda noise: 0 * noise - 1234.567,
    "tiny": lambda noise: 1e-7 * noise,
    "3 and noise": lambda noise: 3 + 1e-7 * noise,
    "share": lambda noise: 4e-4 * noise,
}


@pytest.mark.parametrize("kind", DEAD)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_neurons(kind: str, side: str, dtype: torch.dtype) -> None:
    noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y = torch.randn(6, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    dead_y, dead_x = torch.zeros(6, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    if side != "teacher":
        y[:2], dead_y[:2] = DEAD[kind](noise), True
    if side != "student":
        x[3:], dead_x[3:] = DEAD[kind](noise), True
    y, x, plan = y.to(dtype), x.to(dtype), draw_plan(6, 5, dtype=dtype)
    matrix = matrix_of(CorrelationCost(), y, x)
    value, gradient = value_of(CorrelationCost(), y, x, plan)
    both, either = dead_y[:, None] & dead_x, dead_y[:, None] ^ dead_x
    assert (matrix[both] == 0).all()
    assert (matrix[either] == 1).all()
    live = oracle("correlation", y[~dead_y], x[~dead_x])
    np.testing.assert_allclose(matrix[~dead_y][:, ~dead_x].numpy(), live, atol=1e-5)
    torch.testing.assert_close(value, (plan * matrix).sum(), rtol=1e-5, atol=1e-6)
    assert (gradient[dead_y] == 0).all()
    norms = (y - y.mean(1, keepdim=True)).norm(dim=1)[~dead_y]
    assert (gradient[~dead_y].norm(dim=1) <= plan.sum(1)[~dead_y] / norms * (1 + 1e-5)).all()
    assert gradient[~dead_y].abs().max() > 0


@pytest.mark.parametrize("kind", ["zero", "0.1", "-1234.567", "3 and noise"])
@pytest.mark.parametrize("teacher_dead", [True, False])
def test_layer_that_is_dead_throughout(kind: str, teacher_dead: bool) -> None:
    """The rounding of a constant is no activation, even where no live neuron shows how small it is."""
    y = DEAD[kind](torch.randn(6, 100)) * torch.linspace(0.3, 1.7, 6)[:, None]
    x = DEAD[kind](torch.randn(4, 100)) * torch.linspace(0.2, 2.0, 4)[:, None] if teacher_dead else torch.randn(4, 100)
    plan = torch.full((6, 4), 1 / 24)
    expected = 0.0 if teacher_dead else 1.0
    value, gradient = value_of(CorrelationCost(), y, x, plan)
    assert value.item() == pytest.approx(expected, abs=1e-5)
    assert (gradient == 0).all()
    torch.testing.assert_close(matrix_of(CorrelationCost(), y, x), torch.full((6, 4), expected))
    cost, reference = CorrelationCost(), (y[:, :1], x[:, :1])
    halves = [cost.sums(y[:, part], x[:, part], reference) for part in (slice(0, 37), slice(37, 100))]
    added = cost.matrix([first + second for first, second in zip(*halves, strict=True)], cost.energy(x))
    torch.testing.assert_close(added, torch.full((6, 4), expected))
    [(value, gradient), *_] = over_processes(cost, y, x, plan, (40, 60))
    assert value.item() == pytest.approx(expected, abs=1e-5)
    assert (gradient == 0).all()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_correlation_ignores_the_scale_of_a_layer(side: str, factor: float) -> None:
    y, x = torch.randn(6, 64), torch.randn(5, 64)
    scaled = (y * factor, x) if side == "student" else (y, x * factor)
    expected, plan = matrix_of(CorrelationCost(), y, x), draw_plan(6, 5, dtype=torch.float32)
    torch.testing.assert_close(matrix_of(CorrelationCost(), *scaled), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value_of(CorrelationCost(), *scaled, plan)[0], (expected * plan).sum())


@pytest.mark.parametrize("referenced", [True, False])
def test_float32_keeps_correlations_of_large_means(referenced: bool) -> None:
    """At a mean 1000 times the deviation raw float32 moments are 0.36 off."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(12, 800, generator=generator)
    y = x[:9] + torch.randn(9, 800, generator=generator) + 1000
    x = x - 1000
    cost, expected = CorrelationCost(), oracle("correlation", y, x)
    # The reference is that of an earlier batch: near the means, but not at them.
    reference = (y[:, :100].mean(1, keepdim=True) + 0.5, x[:, :100].mean(1, keepdim=True) - 0.5) if referenced else None
    matrix = cost.matrix(cost.sums(y, x, reference), cost.energy(x))
    np.testing.assert_allclose(matrix.numpy(), expected, atol=2e-4)
    plan = draw_plan(9, 12, dtype=torch.float32)
    assert value_of(cost, y, x, plan)[0].item() == pytest.approx(float((plan.numpy() * expected).sum()), abs=1e-4)


def test_processes_in_float32_keep_correlations_of_large_means() -> None:
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(6, 600, generator=generator) + 1000
    x = y[:5] + torch.randn(5, 600, generator=generator)
    plan = draw_plan(6, 5, dtype=torch.float32)
    expected = float((plan.numpy() * oracle("correlation", y, x)).sum())
    gradient = value_of(CorrelationCost(), y.double(), x.double(), plan.double())[1]
    results = over_processes(CorrelationCost(), y, x, plan, (100, 200, 300))
    for (own_value, own_gradient), part in zip(results, gradient.split((100, 200, 300), -1), strict=True):
        assert own_value.item() == pytest.approx(expected, abs=1e-4)
        torch.testing.assert_close(own_gradient.double(), part, rtol=1e-2, atol=float(part.abs().max()) * 2e-3)


@pytest.mark.parametrize("kind", ["constant", "live"])
def test_value_of_sums_far_from_their_reference(kind: str) -> None:
    """Float32 tells a neuron that moves a little from one that does not, however far the last batches were."""
    cost = get_cost("correlation")
    y, x = draw(6, 40).float(), draw(9, 40, seed=1).float()
    reference = y.mean(1, keepdim=True), x.mean(1, keepdim=True)
    y[2] = 7.3 if kind == "constant" else 7.3 + 1e-3 * y[2]
    x[4] = -5.1 if kind == "constant" else -5.1 + 1e-3 * x[4]
    plan = Plan.of(draw_plan(6, 9).float())
    expected_value, expected_gradient = value_of(cost, y.double(), x.double(), plan.matrix.double())
    parts = [(y[:, :25], x[:, :25]), (y[:, 25:], x[:, 25:])]
    sums = [sum(pair) for pair in zip(*(cost.sums(*part, reference) for part in parts), strict=True)]
    found = [cost.value_of_sums(*part, plan, sums, cost.energy(x), reference) for part in parts]
    gradient = torch.cat([part for _, part in found], 1).double()
    np.testing.assert_allclose(found[0][0].item(), expected_value, rtol=2e-3)
    for row in range(6):
        scale = expected_gradient[row].norm()
        torch.testing.assert_close(gradient[row], expected_gradient[row], rtol=0, atol=2e-3 * scale.item())


def test_moments_far_from_their_reference_leave_neurons_alive() -> None:
    y, x = draw(5, OBSERVATIONS) + 1000, draw(4, OBSERVATIONS, seed=1) - 1000
    zeros = torch.zeros(5, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    cost = get_cost("correlation")
    found = cost.matrix(cost.sums(y, x, zeros), cost.energy(x))
    np.testing.assert_allclose(found.numpy(), oracle("correlation", y, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [3, 60])
def test_rounding_of_a_constant_is_measured_by_its_observations(rows: int) -> None:
    """A neuron that is constant up to rounding is dead, one that moves by ten times as much is alive."""
    observations = 20
    y = torch.full((rows, observations), 1000.0)
    limit = 1000 * 4 * torch.finfo(torch.float32).eps
    signs = torch.tensor([1.0, -1.0]).repeat(observations // 2)
    y[0] += 0.5 * limit * signs
    y[1] += 10 * limit * signs
    sums = get_cost("correlation").sums(y, y.clone(), (torch.full((rows, 1), 1000.0),) * 2)
    assert sums[3][0] == 0
    assert sums[3][1] > 0
    assert (sums[5][0] == 0).all()
