"""Transport plans against scipy, POT, GeomLoss' public solver and a float64 log-domain Sinkhorn written here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import ot
import pytest
import torch
from geomloss.ot import solve_batch
from geomloss.ot._implementations.matrix import softmin_dense
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_otrt.transport import plans
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.plans import (
    FAILURE,
    TOLERANCE,
    ScalingSoftmin,
    diagnose,
    exact_plan,
    identity_plan,
    random_plan,
    run_geomloss_loop,
    sinkhorn_plan,
    uniform_plan,
)

SHAPES = ((24, 24), (16, 40), (40, 16))


def cloud(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cost_between(y: Tensor, x: Tensor, name: str = "euclidean") -> Tensor:
    cost = get_cost(name)
    return cost.matrix(cost.sums(y, x), cost.energy(x))


def random_cost(rows: int, columns: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cdist(cloud(batch, rows, 8, seed=1), cloud(batch, columns, 8, seed=2)).to(dtype)


def oracle_sinkhorn(cost: Tensor, epsilon: float, iterations: int = 5_000) -> Tensor:
    """Alternating log-domain Sinkhorn in float64 at a fixed ε, relative to the mean, until it stands still."""
    scaled = cost.double() / cost.double().mean((1, 2), keepdim=True)
    _, rows, columns = cost.shape
    g = scaled.new_zeros(scaled.shape[0], 1, columns)
    for _ in range(iterations):
        f = -epsilon * (torch.logsumexp((g - scaled) / epsilon, 2, keepdim=True) - math.log(columns))
        update = -epsilon * (torch.logsumexp((f - scaled) / epsilon, 1, keepdim=True) - math.log(rows))
        change, g = (update - g).abs().max().item(), update
        if change < 1e-12:
            break
    return ((f + g - scaled) / epsilon).exp() / (rows * columns)


def check_plan(plan: Tensor, rows: int, columns: int, error: float = TOLERANCE) -> None:
    assert plan.isfinite().all()
    assert (plan >= 0).all()
    assert not plan.requires_grad
    torch.testing.assert_close(plan.sum(-1), torch.full_like(plan.sum(-1), 1 / rows), rtol=1e-5, atol=0)
    assert (plan.sum(-2) - 1 / columns).abs().sum(-1).max() <= error * 1.01


@pytest.fixture(params=["loop", "fallback"])
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to anneal: GeomLoss' private loop, and its public solver, which serves where the loop is gone."""
    if request.param == "fallback":
        monkeypatch.setattr(plans, "sinkhorn_loop", None)
    return request.param


# --- exact ---------------------------------------------------------------------------------------------------------


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


# --- entropic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("epsilon", [0.1, pytest.param(0.02, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinkhorn_plan_is_the_entropic_plan(
    rows: int, columns: int, epsilon: float, dtype: torch.dtype, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    precise = dtype == torch.float64
    monkeypatch.setattr(plans, "TOLERANCE", 1e-10 if precise else 1e-5)
    # Costs of very different sizes share a batch: each has an ε of its own.
    cost = random_cost(rows, columns, batch=2, dtype=dtype) * torch.tensor([1.0, 1e4], dtype=dtype)[:, None, None]
    result = sinkhorn_plan(cost, epsilon)
    assert {tensor.dtype for tensor in result} == {dtype}
    check_plan(result.matrix, rows, columns)
    torch.testing.assert_close(
        result.marginal_error, (result.matrix.sum(1) - 1 / columns).abs().sum(1), rtol=1e-3, atol=1e-7
    )
    atol = (1e-8 if precise else 2e-4) * result.matrix.max().item()
    torch.testing.assert_close(result.matrix.double(), oracle_sinkhorn(cost, epsilon), rtol=0, atol=atol)
    for own, problem in zip(result.matrix, cost.double(), strict=True):
        scaled = (problem / problem.mean()).numpy()
        a, b = np.full(rows, 1 / rows), np.full(columns, 1 / columns)
        pot = ot.bregman.sinkhorn_log(a, b, scaled, epsilon, numItermax=5_000, stopThr=1e-11)
        np.testing.assert_allclose(own.numpy(), pot, rtol=0, atol=atol)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_sinkhorn_plan_is_that_of_geomloss(
    rows: int, columns: int, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "TOLERANCE", 1e-6)
    cost = random_cost(rows, columns, batch=2)
    plan = sinkhorn_plan(cost, 0.1).matrix
    # Its ε is absolute, and falls until the last of its iterations, so that it is never quite at rest.
    expected = solve_batch(cost / cost.mean((1, 2), keepdim=True), reg=0.1, max_iter=4_000).plan
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-3 * plan.max().item())


@pytest.mark.parametrize("kind", ["perturbed", "independent"])
@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (256, 128), (128, 256)])
@pytest.mark.parametrize("name", ["correlation", "euclidean", "sqeuclidean"])
def test_value_is_close_to_that_of_the_exact_plan(kind: str, rows: int, columns: int, name: str, solver: str) -> None:
    if kind == "perturbed":
        shared = cloud(max(rows, columns), 64, seed=3)[torch.arange(max(rows, columns)) % min(rows, columns)]
        y = shared[:rows][torch.randperm(rows)] + 0.3 * cloud(rows, 64, seed=4)
        x = shared[:columns]
    else:
        y, x = cloud(rows, 64, seed=3), cloud(columns, 64, seed=4)
    cost = cost_between(y, x, name)[None]
    expected = ot.emd2([], [], cost[0].double().numpy())
    for epsilon, accuracy in ((0.01, 0.01), (0.005, 0.005)):
        result = sinkhorn_plan(cost, epsilon)
        numbers = diagnose(result.matrix)
        assert max(numbers.student_error.item(), numbers.teacher_error.item()) <= 3e-2
        assert (result.matrix * cost).sum().item() == pytest.approx(expected, rel=accuracy)


HARD: dict[str, Callable[[], Tensor]] = {
    "independent clouds": lambda: cost_between(cloud(2048, 64, seed=3), cloud(2048, 64, seed=4))[None],
    "uniform noise": lambda: torch.rand(1, 2048, 2048),
    "wide clouds": lambda: cost_between(cloud(256, 1024, seed=3), cloud(200, 1024, seed=4))[None],
    "dead neurons": lambda: cost_between(
        cloud(200, 32, seed=3) * (torch.arange(200) % 5 != 0)[:, None],
        cloud(128, 32, seed=4) * (torch.arange(128) % 3 != 0)[:, None],
        "correlation",
    )[None],
    "duplicates": lambda: cost_between(
        cloud(20, 64, seed=3)[torch.randint(0, 20, (256,))], cloud(20, 64, seed=3)[torch.randint(0, 20, (128,))]
    )[None],
    "correlated duplicates": lambda: cost_between(
        cloud(256, 64, seed=5) * 0.1 + cloud(20, 64, seed=3)[torch.randint(0, 20, (256,))],
        cloud(20, 64, seed=3)[torch.randint(0, 20, (128,))],
        "correlation",
    )[None],
    "span of 1e6": lambda: 10 ** (6 * torch.rand(1, 96, 64) - 3),
    "span of 1e6, rows": lambda: torch.rand(1, 96, 64) * 10 ** (6 * torch.rand(1, 96, 1) - 3),
    "span of 1e6, columns": lambda: torch.rand(1, 96, 64) * 10 ** (6 * torch.rand(1, 1, 64) - 3),
    "massive teacher neuron": lambda: cost_between(
        cloud(96, 64), cloud(64, 64, seed=1) * (1 + 999 * (torch.arange(64) == 5))[:, None], "sqeuclidean"
    )[None],
    "massive student neuron": lambda: cost_between(
        cloud(96, 64) * (1 + 999 * (torch.arange(96) == 5))[:, None], cloud(64, 64, seed=1), "sqeuclidean"
    )[None],
    "huge costs": lambda: torch.rand(1, 64, 48) * 1e20,
    "tiny costs": lambda: torch.rand(1, 64, 48) * 1e-30,
    "float64": lambda: torch.rand(1, 64, 48, dtype=torch.float64),
    "batch of a zero and a live cost": lambda: torch.stack([torch.zeros(16, 24), torch.rand(16, 24)]),
    "zero": lambda: torch.zeros(1, 16, 24),
    "constant": lambda: torch.full((1, 16, 24), 3.0),
    "1 x 1": lambda: torch.rand(1, 1, 1),
    "1 x 1, zero": lambda: torch.zeros(1, 1, 1),
    "1 x M": lambda: torch.rand(1, 1, 9),
    "N x 1": lambda: torch.rand(1, 9, 1),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_costs(name: str, solver: str) -> None:
    cost = HARD[name]()
    _, rows, columns = cost.shape
    result = sinkhorn_plan(cost, 0.005)
    check_plan(result.matrix, rows, columns)
    assert result.potential.isfinite().all()
    value = (result.matrix * cost).sum((1, 2)).double()
    uniform = cost.double().mean((1, 2))
    assert (value <= uniform * (1 + 1e-3)).all()
    if rows * columns <= 256 * 256:
        exact = (exact_plan(cost) * cost).sum((1, 2)).double()
        # ⟨P_ε, M⟩ - ⟨P*, M⟩ <= ε · (entropy of the exact plan - that of P_ε) <= ε log min(N, M), in units of the mean.
        bias = 0.005 * math.log(min(rows, columns)) * uniform
        # What the plan's marginal error can change: at most the error times the largest cost.
        slack = TOLERANCE * cost.double().amax((1, 2)) + 1e-6 * uniform
        assert (value <= exact + bias + slack).all()
        assert (value >= exact - slack).all()


OUT_OF_REACH = {
    "one neuron x 1000": lambda x: x * (1 + 999 * (torch.arange(48) == 5))[:, None],
    "five neurons x 100": lambda x: x * (1 + 99 * (torch.arange(48) < 5))[:, None],
    "norms that vary": lambda x: x * torch.exp(torch.linspace(-1, 1, 48))[:, None],
    "one opposite to all others": lambda x: torch.cat((-torch.ones_like(x[:1]), 1 + 0.3 * x[1:])),
}


@pytest.mark.parametrize("kind", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("name", OUT_OF_REACH)
def test_training_solves_reach_teacher_neurons_far_from_all_others(name: str, kind: str) -> None:
    """Else the floor of the kernel fills their columns evenly, which looks converged and is no plan."""
    x = OUT_OF_REACH[name](cloud(48, 64, seed=1))
    cost = cost_between(cloud(64, 64), x, kind)[None]
    oracle = oracle_sinkhorn(cost, 0.01)
    potential = None
    for _ in range(6):
        result = sinkhorn_plan(cost, 0.01, potential=potential, iterations=plans.TRAINING_ITERATIONS)
        potential = result.potential
    assert result.marginal_error.item() < 0.05
    distance, of_uniform = ((matrix - oracle).abs().sum() for matrix in (result.matrix.double(), 1 / (64 * 48)))
    assert distance < min(0.1, 0.3 * of_uniform)


@pytest.mark.parametrize("kind", ["euclidean", "sqeuclidean"])
def test_a_potential_of_another_layer_does_not_mislead(kind: str) -> None:
    stale = sinkhorn_plan(cost_between(cloud(64, 64), 30 * cloud(48, 64, seed=1), kind)[None], 0.01).potential
    x = cloud(48, 64, seed=2) * torch.exp(1.5 * torch.randn(48, 1, generator=torch.Generator().manual_seed(0)))
    cost = cost_between(cloud(64, 64, seed=3), x, kind)[None]
    result = sinkhorn_plan(cost, 0.01, potential=100 * stale, iterations=plans.WARM_ITERATIONS)
    distance = (result.matrix.double() - oracle_sinkhorn(cost, 0.01)).abs().sum().item()
    # What is not converged says so: a plan this far from the right one must show it in its marginal error.
    assert distance < 10 * result.marginal_error.item() + 0.05


@pytest.mark.parametrize("epsilon", [0.01, 0.001])
@pytest.mark.parametrize("seed", range(4))
def test_costs_that_span_any_range_converge_to_the_plan(seed: int, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.exp(4 * torch.randn(1, 60, 40, generator=generator))
    result = sinkhorn_plan(cost, epsilon)
    exact = (exact_plan(cost) * cost).sum().item()
    bias = epsilon * math.log(40) * cost.mean().item()
    assert (result.matrix * cost).sum().item() <= exact + bias + result.marginal_error.item() * cost.max().item()


@pytest.mark.parametrize("name", ["zero", "constant", "1 x 1", "1 x M", "N x 1"])
def test_cost_without_preference_gives_the_uniform_plan(name: str, solver: str) -> None:
    cost = HARD[name]()
    expected = torch.full_like(cost, 1 / cost[0].numel())
    torch.testing.assert_close(sinkhorn_plan(cost, 0.01).matrix, expected, rtol=1e-3, atol=0)


def test_failure_to_converge_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_ITERATIONS", 10)
    monkeypatch.setattr(plans, "FAILURE", 1e-6)
    words = (
        r"cost of shape \(48, 40\) did not converge: after 10 iterations its marginal error is 0\.\d+ \(at most 1e-06 "
        r"is accepted\) at epsilon=0\.001 of the mean cost, with costs between 0.* and \d.*larger `epsilon` or "
        r'`plan="exact"`'
    )
    with pytest.raises(RuntimeError, match=words):
        sinkhorn_plan(random_cost(48, 40), 0.001)


def test_slow_convergence_short_of_failure_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = random_cost(48, 40)
    monkeypatch.setattr(plans, "TOLERANCE", 0.0)
    monkeypatch.setattr(plans, "MAX_ITERATIONS", 200)
    result = sinkhorn_plan(cost, 0.02)
    assert 0 < result.marginal_error.item() <= FAILURE


def test_non_finite_cost_never_becomes_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_ITERATIONS", 20)
    cost = random_cost(8, 8)
    cost[0, 0, 0] = math.nan
    with pytest.raises(RuntimeError, match="did not converge"):
        sinkhorn_plan(cost, 0.01)


def test_warm_start_reaches_the_same_plan_sooner() -> None:
    # Clusters of one or two student neurons around each teacher neuron: masses must flow far, the slow case.
    x = cloud(64, 64, seed=1)
    y = cloud(96, 64, seed=2) + 3 * x[torch.arange(96) % 64]
    cost = cost_between(y, x)[None]
    cold = sinkhorn_plan(cost, 0.01)
    moved = cost_between(y + 0.05 * cloud(96, 64, seed=7), x)[None]
    errors = [
        sinkhorn_plan(moved, 0.01, potential=start, iterations=20).marginal_error.item()
        for start in (cold.potential, torch.zeros_like(cold.potential), None)
    ]
    assert errors[0] < 0.3 * min(errors[1:])
    target, warm = sinkhorn_plan(moved, 0.01), sinkhorn_plan(moved, 0.01, potential=cold.potential)
    check_plan(warm.matrix, 96, 64)
    torch.testing.assert_close(warm.matrix, target.matrix, rtol=0, atol=0.03 * target.matrix.max().item())
    assert (warm.matrix * moved).sum().item() == pytest.approx((target.matrix * moved).sum().item(), rel=2e-3)


def test_number_of_iterations_is_kept_and_split_in_blocks_alike() -> None:
    cost = random_cost(24, 40)
    errors = [sinkhorn_plan(cost, 0.02, iterations=count).marginal_error.item() for count in (1, 5, 14, 60, 300)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < TOLERANCE < errors[0]
    one_by_one = sinkhorn_plan(cost, 0.02, iterations=1)
    start = one_by_one.potential
    assert start.mean().abs() < 10, "potentials drift by a constant"
    whole = plans._alternate(cost, start, 0.02, 25, 1 / cost.mean()).matrix
    for _ in range(25):
        result = plans._alternate(cost, start, 0.02, 1, 1 / cost.mean())
        start = result.potential
    torch.testing.assert_close(whole, result.matrix, rtol=1e-3, atol=1e-7)


def test_training_solve_is_accurate_enough() -> None:
    """What a training step gets without ever waiting for the device."""
    for name in ("correlation", "euclidean", "sqeuclidean"):
        cost = cost_between(cloud(128, 256, seed=3), cloud(256, 256, seed=4), name)[None]
        result = sinkhorn_plan(cost, 0.01, iterations=plans.TRAINING_ITERATIONS)
        assert result.marginal_error.item() <= 3e-2


def test_first_training_solve_needs_its_staircase() -> None:
    """From a potential of zero the few updates of a training step leave masses of rectified neurons far off."""
    scales = [torch.rand(rows, 1, generator=torch.Generator().manual_seed(rows)).exp() for rows in (256, 128)]
    y, x = (cloud(len(scale), 64, seed=3 + k).relu() * scale for k, scale in enumerate(scales))
    cost = cost_between(y, x)[None]
    cold, zero = (
        sinkhorn_plan(cost, 0.01, potential=start, iterations=plans.TRAINING_ITERATIONS).marginal_error.item()
        for start in (None, torch.zeros(1, 128))
    )
    assert cold < 0.5 * zero


def test_kernel_holds_no_denormal_number() -> None:
    """They cost a CPU ten times the time of others, and hard costs are full of them."""
    cost = 100 * torch.rand(2, 32, 24)
    loop, _ = plans._kernel_and_top(cost, torch.zeros(2, 24), 0.005)
    assert (loop.amax(2) == 1).all()
    updates, _ = plans._updates(cost, torch.zeros(2, 24), 0.005, 5, torch.ones(2, 1, 1))
    for kernel in (loop, updates):
        assert kernel.min() >= math.exp(-41)


# --- GeomLoss' private loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_contract_same_potentials_as_the_dense_softmin_of_geomloss(rows: int, columns: int) -> None:
    cost = random_cost(rows, columns, batch=3)
    cost = cost / cost.mean((1, 2), keepdim=True)
    epsilons = [0.3, 0.3, 0.06, 0.06, 0.06, 0.01, 0.01, 0.01, 0.01]

    def dense(epsilon: float, log_weights: Tensor, side: object, potential: Tensor) -> Tensor:
        return softmin_dense(epsilon, log_weights, cost if side == "xy" else cost.mT, potential)

    matrices = []
    for softmin in (dense, ScalingSoftmin(cost)):
        found = run_geomloss_loop(cost, epsilons, softmin)
        assert found.f_ba.shape == (3, rows)
        assert found.g_ab.shape == (3, columns)
        exponent = (found.f_ba[:, :, None] + found.g_ab[:, None] - cost) / epsilons[-1]
        matrices.append(exponent.exp() / (rows * columns))
    torch.testing.assert_close(matrices[1], matrices[0], rtol=0, atol=1e-4 * matrices[0].max().item())
    # The loop is Sinkhorn's: its potentials are those of a plan whose masses come close to uniform.
    assert diagnose(matrices[0]).teacher_error.max() < 0.3


def test_contract_order_of_the_calls() -> None:
    """ScalingSoftmin rebuilds its kernel on the "xy" call of a new ε: so that call must come first, with g of then."""
    cost = random_cost(6, 9)
    calls: list[tuple[float, str, tuple[int, ...], float]] = []

    def softmin(epsilon: float, log_weights: Tensor, side: str, potential: Tensor) -> Tensor:
        calls.append((epsilon, side, tuple(potential.shape), log_weights.exp().sum().item()))
        return torch.zeros(1, 6 if side == "xy" else 9)

    run_geomloss_loop(cost, [0.3, 0.3, 0.1], softmin)
    # One pair a step, then the last, parallel update at the last ε.
    expected = [step for epsilon in (math.inf, 0.3, 0.3, 0.1, 0.1) for step in ((epsilon, "xy"), (epsilon, "yx"))]
    assert [call[:2] for call in calls] == expected
    # "xy" is asked with the teacher's potential and weights, "yx" with the student's; the weights sum to 1.
    assert {call[1:3] for call in calls} == {("xy", (1, 9)), ("yx", (1, 6))}
    assert [call[3] for call in calls] == pytest.approx([1.0] * len(calls))


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


def test_softmin_at_infinity_is_that_of_geomloss() -> None:
    cost = random_cost(6, 9)
    for side, matrix in (("xy", cost), ("yx", cost.mT)):
        weights = cost.new_full((1, matrix.shape[2]), -math.log(matrix.shape[2]))
        expected = softmin_dense(math.inf, weights, matrix, 0 * weights)
        torch.testing.assert_close(ScalingSoftmin(cost)(math.inf, weights, side, 0 * weights), expected)


def test_softmin_of_a_far_potential_stays_finite() -> None:
    """Its exponential overflows float32; cut, it is taken up when the next ε rebuilds the kernel."""
    cost = random_cost(6, 9)
    softmin = ScalingSoftmin(cost)
    weights = [cost.new_full((1, size), -math.log(size)) for size in (6, 9)]
    near = softmin(0.01, weights[1], "xy", torch.zeros(1, 9))
    for distance in (-100.0, 100.0):
        assert softmin(0.01, weights[0], "yx", near + distance).isfinite().all()


@pytest.mark.parametrize("enabled", [True, False])
def test_contract_autograd_mode_is_restored(enabled: bool, solver: str) -> None:
    cost = random_cost(6, 9).requires_grad_()
    with torch.set_grad_enabled(enabled):
        if solver == "loop":
            run_geomloss_loop(cost.detach(), [0.3, 0.1], ScalingSoftmin(cost.detach()))
            assert torch.is_grad_enabled() == enabled
        result = sinkhorn_plan(cost, 0.01)
        assert torch.is_grad_enabled() == enabled
        assert not any(tensor.requires_grad for tensor in result)


def test_error_inside_the_loop_leaves_autograd_on(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GeomLoss itself leaves it off: it switches it off by hand and back without a ``finally``."""

    def fail(*args: object, **kwargs: object) -> Iterator[None]:
        torch.set_grad_enabled(False)
        raise ArithmeticError("from within")

    monkeypatch.setattr(plans, "run_geomloss_loop" if solver == "loop" else "solve_batch", fail)
    with pytest.raises(ArithmeticError, match="from within"):
        sinkhorn_plan(random_cost(4, 4), 0.01)
    assert torch.is_grad_enabled()


# --- controls and diagnostics --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("batch", [(), (3,)])
def test_diagnose(batch: tuple[int, ...]) -> None:
    assignment = (torch.eye(8)[[1, 0, 2, 3, 4, 5, 6, 7]] / 8).expand(*batch, 8, 8)
    numbers = diagnose(assignment)
    for number, expected in zip(numbers, (0.0, 0.0, 0.5, 0.25), strict=True):
        torch.testing.assert_close(number, torch.full(batch, expected))
    torch.testing.assert_close(diagnose(uniform_plan(8, 8).expand(*batch, 8, 8)).entropy, torch.ones(batch))
    wide = torch.zeros(*batch, 2, 4)
    wide[..., 0, 0], wide[..., 1, 1] = 0.6, 0.4
    numbers = diagnose(wide)
    torch.testing.assert_close(numbers.student_error, torch.full(batch, 0.2))
    torch.testing.assert_close(numbers.teacher_error, torch.full(batch, 0.35 + 0.15 + 0.5))
    entropy = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4)) / math.log(8)
    torch.testing.assert_close(numbers.entropy, torch.full(batch, entropy))
    assert numbers.off_identity.isnan().all()
    assert numbers.off_identity.shape == batch
    assert (diagnose(torch.ones(*batch, 1, 1)).entropy == 0).all()


@pytest.mark.parametrize("kind", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("is_permuted", [True, False])
def test_default_solves_agree_with_the_converged_public_solver(kind: str, is_permuted: bool) -> None:
    """GeomLoss' own solver, until it has converged: the value within 0.5 %, of a converged and of a training solve."""
    x = cloud(128, 256, seed=1)
    y = x[torch.randperm(128)] + 0.3 * cloud(128, 256) if is_permuted else cloud(128, 256)
    cost = cost_between(y, x, kind)[None]
    cost = cost / cost.mean()
    with torch.no_grad():
        expected = (solve_batch(cost.double(), reg=0.01, max_iter=1000).plan * cost).sum().item()
    for iterations in (None, plans.TRAINING_ITERATIONS):
        found = (sinkhorn_plan(cost, 0.01, iterations=iterations).matrix * cost).sum().item()
        assert found == pytest.approx(expected, rel=5e-3)
