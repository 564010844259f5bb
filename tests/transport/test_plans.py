"""Exact plans against scipy and POT, and the controls."""

from __future__ import annotations

import math

import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from transport_problems import SHAPES, check_plan, random_cost

from lightning_otrt.transport import plans
from lightning_otrt.transport.plans import exact_plan, identity_plan, random_plan, uniform_plan
from lightning_otrt.transport.sinkhorn import sinkhorn_plan


@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (1, 1), (1, 6), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_plan(rows: int, columns: int, dtype: torch.dtype) -> None:
    cost = random_cost(rows, columns, batch=3, dtype=dtype)
    plan = exact_plan(cost)
    assert plan.dtype == dtype
    check_plan(plan, rows, columns, 1e-6)
    for own, problem in zip(plan, cost.double().numpy(), strict=True):
        value = float((own.double().numpy() * problem).sum())
        assert value == pytest.approx(ot.emd2([], [], problem), rel=1e-6)
        if rows == columns:
            assert value == pytest.approx(problem[linear_sum_assignment(problem)].mean(), rel=1e-6)
            assert ((own > 0).sum(0) == 1).all()


def test_exact_plan_without_pot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ot", None)
    check_plan(exact_plan(random_cost(5, 5)), 5, 5)
    with pytest.raises(ModuleNotFoundError, match=r"between 5 student and 7 teacher neurons needs POT.*pip install"):
        exact_plan(random_cost(5, 7))


@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (1, 1), (1, 6), (6, 1), (7, 5), (1000, 384)])
def test_random_plan_is_a_balanced_assignment(rows: int, columns: int) -> None:
    state = torch.get_rng_state()
    plan = random_plan(rows, columns, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    check_plan(plan, rows, columns, 1e-6)
    # As few neurons as possible are split: the north-west corner rule leaves at most N + M - gcd entries.
    assert int((plan > 1e-8).sum()) == rows + columns - math.gcd(rows, columns)
    torch.manual_seed(1234)
    assert torch.equal(random_plan(rows, columns, seed=3), plan)
    if min(rows, columns) > 1:
        assert not torch.equal(random_plan(rows, columns, seed=4), plan)


@pytest.mark.parametrize(("rows", "columns"), [(4, 8), (8, 4)])
def test_random_plan_permutes_both_sides(rows: int, columns: int) -> None:
    drawn = torch.stack([random_plan(rows, columns, seed) for seed in range(200)])
    torch.testing.assert_close(drawn.mean(0), uniform_plan(rows, columns), rtol=0.6, atol=0)
    # The two that share a partner are neighbours in a side left in order; of 7 others each is as likely.
    wide = drawn if columns == 8 else drawn.mT
    shared = (wide[:, :, 0] * wide[:, :, 1]).sum(1) > 0
    assert 0.05 < shared.float().mean() < 0.25


def test_identity_and_uniform_plan() -> None:
    assert torch.equal(identity_plan(4, 4), torch.eye(4) / 4)
    assert torch.equal(uniform_plan(4, 5), torch.full((4, 5), 0.05))
    with pytest.raises(ValueError, match=r"layer 'a' -> 'b' has 4 student and 5 teacher neurons. Use plan="):
        identity_plan(4, 5, "layer 'a' -> 'b'")


@pytest.mark.parametrize("kind", plans.CONTROLS)
def test_controls_do_not_look_at_the_cost(kind: str) -> None:
    cost = random_cost(6, 6, batch=2)
    fixed = plans.fixed_plan(kind, 6, 6, seed=3)
    assert fixed is not None
    solved = plans.solve_plan(cost, kind, epsilon=0.1, seed=3)
    assert solved.shape == cost.shape
    for plan in solved:
        torch.testing.assert_close(plan, fixed, rtol=0, atol=0)


def test_plans_that_are_solved() -> None:
    cost = random_cost(6, 6, batch=2)
    assert plans.fixed_plan("sinkhorn", 6, 6, seed=0) is None
    torch.testing.assert_close(plans.solve_plan(cost, "exact", 0.1, 0), exact_plan(cost))
    torch.testing.assert_close(plans.solve_plan(cost, "sinkhorn", 0.1, 0), sinkhorn_plan(cost, 0.1).matrix)


def test_names_of_plans() -> None:
    for kind in plans.PLANS:
        plans.check_plan(kind)
    with pytest.raises(ValueError, match=r"`plan` to be one of \['sinkhorn', .*\], but got 'emd'"):
        plans.check_plan("emd")
    with pytest.raises(ValueError, match="but got 'static'"):
        plans.check_plan("static", allowed=plans.ONE_BATCH_PLANS)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, -0.1, math.nan, math.inf, "0.01", None])
def test_epsilon_out_of_range(epsilon: object) -> None:
    plans.check_epsilon(0.999)
    with pytest.raises(ValueError, match=rf"`epsilon` to lie between 0 and 1, but got {epsilon!r}"):
        plans.check_epsilon(epsilon)
