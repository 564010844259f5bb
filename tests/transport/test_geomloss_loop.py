"""What the package relies on in GeomLoss, and the softmin that it passes to it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from geomloss.ot._implementations.matrix import softmin_dense
from torch import Tensor
from transport_problems import SHAPES, random_cost

from lightning_otrt.transport import geomloss_loop
from lightning_otrt.transport.diagnostics import diagnose
from lightning_otrt.transport.geomloss_loop import ScalingSoftmin, annealed_potential, annealing, run_geomloss_loop
from lightning_otrt.transport.sinkhorn import sinkhorn_plan


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_contract_same_potentials_as_the_dense_softmin_of_geomloss(rows: int, columns: int) -> None:
    cost = random_cost(rows, columns, batch=3)
    cost = cost / cost.mean((1, 2), keepdim=True)
    epsilons = [0.3, 0.3, 0.06, 0.06, 0.06, 0.01, 0.01, 0.01, 0.01]

    def dense(epsilon: float, log_weights: Tensor, side: object, potential: Tensor) -> Tensor:
        return softmin_dense(epsilon, log_weights, cost if side == "xy" else cost.mT, potential)

    matrices = []
    for softmin in (dense, ScalingSoftmin(cost, torch.ones(3, 1, 1))):
        found = run_geomloss_loop(cost, epsilons, softmin)
        assert found.f_ba.shape == (3, rows)
        assert found.g_ab.shape == (3, columns)
        exponent = (found.f_ba[:, :, None] + found.g_ab[:, None] - cost) / epsilons[-1]
        matrices.append(exponent.exp() / (rows * columns))
    torch.testing.assert_close(matrices[1], matrices[0], rtol=0, atol=1e-4 * matrices[0].max().item())
    # The loop is Sinkhorn's: its potentials are those of a plan whose masses come close to uniform.
    assert diagnose(matrices[0]).teacher_error.max() < 0.3


def test_contract_order_of_the_calls() -> None:
    """ScalingSoftmin rebuilds its kernel at a new ε from the potential of the "xy" call, which has to come first."""
    cost = random_cost(6, 9)
    calls: list[tuple[float, str, tuple[int, ...], float]] = []

    def softmin(epsilon: float, log_weights: Tensor, side: str, potential: Tensor) -> Tensor:
        calls.append((epsilon, side, tuple(potential.shape), log_weights.exp().sum().item()))
        return torch.zeros(1, 6 if side == "xy" else 9)

    run_geomloss_loop(cost, [0.3, 0.3, 0.1], softmin)
    # One pair a step, then the last, parallel update at the last ε.
    expected = [step for epsilon in (math.inf, 0.3, 0.3, 0.1, 0.1) for step in ((epsilon, "xy"), (epsilon, "yx"))]
    assert [call[:2] for call in calls] == expected
    whole, calls[:] = calls[:], []
    run_geomloss_loop(cost, [0.3, 0.3, 0.1], softmin, last_update=False)
    assert calls == whole[:-2]
    # "xy" comes with the teacher's potential and weights, "yx" with the student's; the weights sum to 1.
    assert {call[1:3] for call in whole} == {("xy", (1, 9)), ("yx", (1, 6))}
    assert [call[3] for call in whole] == pytest.approx([1.0] * len(whole))


def test_contract_start_averages_and_update() -> None:
    cost = random_cost(6, 9)
    cost = cost / cost.mean()
    asked: list[tuple[str, Tensor]] = []

    def softmin(epsilon: float, log_weights: Tensor, side: str, potential: Tensor) -> Tensor:
        asked.append((side, potential.clone()))
        if epsilon == math.inf:
            return cost.mean(2 if side == "xy" else 1)
        return torch.full((1, 6 if side == "xy" else 9), 2.0)

    found = run_geomloss_loop(cost, [0.3, 0.3], softmin)
    f, g = cost.mean(2) - 0.5, cost.mean(1) - 0.5
    # Both starts are the mean cost less half of its mean; a step moves halfway to the update; the last one all the way.
    assert (asked[0][1] == 0).all()
    torch.testing.assert_close(asked[2][1], g)
    torch.testing.assert_close(asked[3][1], f)
    torch.testing.assert_close(asked[4][1], (g + 2) / 2)
    torch.testing.assert_close(asked[5][1], (f + 2) / 2)
    assert (found.f_ba == 2).all()
    assert (found.g_ab == 2).all()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_annealed_potential_is_that_of_the_whole_loop(rows: int, columns: int) -> None:
    """Its last update is that of the teacher's side alone."""
    cost = random_cost(rows, columns, batch=2).double()
    inverse = 1 / cost.mean((1, 2), keepdim=True)
    scaled = cost * inverse

    def dense(epsilon: float, log_weights: Tensor, side: object, potential: Tensor) -> Tensor:
        return softmin_dense(epsilon, log_weights, scaled if side == "xy" else scaled.mT, potential)

    expected = run_geomloss_loop(scaled, annealing(0.1), dense).g_ab
    torch.testing.assert_close(annealed_potential(cost, 0.1, inverse), expected)


def test_softmin_at_infinity_is_that_of_geomloss() -> None:
    cost = random_cost(6, 9)
    for side, matrix in (("xy", cost), ("yx", cost.mT)):
        weights = cost.new_full((1, matrix.shape[2]), -math.log(matrix.shape[2]))
        expected = softmin_dense(math.inf, weights, matrix, 0 * weights)
        torch.testing.assert_close(
            ScalingSoftmin(cost, torch.ones(1, 1, 1))(math.inf, weights, side, 0 * weights), expected
        )


def test_softmin_of_a_far_potential_stays_finite() -> None:
    """Its exponential would overflow float32."""
    cost = random_cost(6, 9)
    softmin = ScalingSoftmin(cost, torch.ones(1, 1, 1))
    weights = [cost.new_full((1, size), -math.log(size)) for size in (6, 9)]
    near = softmin(0.01, weights[1], "xy", torch.zeros(1, 9))
    for distance in (-100.0, 100.0):
        assert softmin(0.01, weights[0], "yx", near + distance).isfinite().all()


@pytest.mark.parametrize("enabled", [True, False])
def test_contract_autograd_mode_is_restored(enabled: bool, solver: str) -> None:
    cost = random_cost(6, 9).requires_grad_()
    with torch.set_grad_enabled(enabled):
        if solver == "loop":
            run_geomloss_loop(cost.detach(), [0.3, 0.1], ScalingSoftmin(cost.detach(), torch.ones(1, 1, 1)))
            assert torch.is_grad_enabled() == enabled
        result = sinkhorn_plan(cost, 0.01)
        assert torch.is_grad_enabled() == enabled
        assert not any(tensor.requires_grad for tensor in result)


def test_error_inside_the_loop_leaves_autograd_on(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GeomLoss itself leaves it off: it switches it off by hand and back without a ``finally``."""

    def fail(*args: object, **kwargs: object) -> Iterator[None]:
        torch.set_grad_enabled(False)
        raise ArithmeticError("from within")

    monkeypatch.setattr(geomloss_loop, "run_geomloss_loop" if solver == "loop" else "solve_batch", fail)
    with pytest.raises(ArithmeticError, match="from within"):
        sinkhorn_plan(random_cost(4, 4), 0.01)
    assert torch.is_grad_enabled()
