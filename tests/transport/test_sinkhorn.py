"""Entropic plans against POT, GeomLoss' public solver and a float64 log-domain Sinkhorn written here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import ot
import pytest
import torch
from geomloss.ot import solve_batch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transport_problems import SHAPES, check_plan, cloud, cost_between, oracle_sinkhorn, random_cost

from lightning_otrt.transport import geomloss_loop, sinkhorn
from lightning_otrt.transport.diagnostics import diagnose
from lightning_otrt.transport.geomloss_loop import ScalingSoftmin
from lightning_otrt.transport.plans import exact_plan
from lightning_otrt.transport.sinkhorn import FAILURE, TOLERANCE, sinkhorn_plan


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("epsilon", [0.1, pytest.param(0.02, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinkhorn_plan_is_the_entropic_plan(
    rows: int, columns: int, epsilon: float, dtype: torch.dtype, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    precise = dtype == torch.float64
    monkeypatch.setattr(sinkhorn, "TOLERANCE", 1e-10 if precise else 1e-5)
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
    monkeypatch.setattr(sinkhorn, "TOLERANCE", 1e-6)
    cost = random_cost(rows, columns, batch=2)
    plan = sinkhorn_plan(cost, 0.1).matrix
    # Its ε is absolute, and falls until the last of its iterations, so that it is never quite at rest.
    expected = solve_batch(cost / cost.mean((1, 2), keepdim=True), reg=0.1, max_iter=4_000).plan
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-3 * plan.max().item())


@pytest.mark.parametrize("kind", ["perturbed", "independent"])
@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (256, 128), (128, 256)])
@pytest.mark.parametrize("name", ["correlation", "euclidean", "sqeuclidean"])
def test_value_is_close_to_that_of_the_exact_plan(kind: str, rows: int, columns: int, name: str) -> None:
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
        result = sinkhorn_plan(cost, 0.01, potential=potential, iterations=sinkhorn.TRAINING_ITERATIONS)
        potential = result.potential
    assert result.marginal_error.item() < 0.05
    distance, of_uniform = ((matrix - oracle).abs().sum() for matrix in (result.matrix.double(), 1 / (64 * 48)))
    assert distance < min(0.1, 0.3 * of_uniform)


@pytest.mark.parametrize("kind", ["euclidean", "sqeuclidean"])
def test_a_potential_of_another_layer_does_not_mislead(kind: str) -> None:
    stale = sinkhorn_plan(cost_between(cloud(64, 64), 30 * cloud(48, 64, seed=1), kind)[None], 0.01).potential
    x = cloud(48, 64, seed=2) * torch.exp(1.5 * torch.randn(48, 1, generator=torch.Generator().manual_seed(0)))
    cost = cost_between(cloud(64, 64, seed=3), x, kind)[None]
    result = sinkhorn_plan(cost, 0.01, potential=100 * stale, iterations=sinkhorn.TRAINING_ITERATIONS)
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
    monkeypatch.setattr(sinkhorn, "MAX_ITERATIONS", sinkhorn.BLOCK)
    monkeypatch.setattr(sinkhorn, "FAILURE", 1e-6)
    words = (
        rf"cost of shape \(48, 40\) did not converge: after {sinkhorn.BLOCK} iterations its marginal error is 0\.\d+ "
        r"\(at most 1e-06 is accepted\) at epsilon=0\.001 of the mean cost, with costs between 0.* and \d.*larger "
        r'`epsilon` or `plan="exact"`'
    )
    with pytest.raises(RuntimeError, match=words):
        sinkhorn_plan(random_cost(48, 40), 0.001)


def test_slow_convergence_short_of_failure_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = random_cost(48, 40)
    monkeypatch.setattr(sinkhorn, "TOLERANCE", 0.0)
    monkeypatch.setattr(sinkhorn, "MAX_ITERATIONS", 200)
    result = sinkhorn_plan(cost, 0.02)
    assert 0 < result.marginal_error.item() <= FAILURE


def test_non_finite_cost_never_becomes_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinkhorn, "MAX_ITERATIONS", 20)
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
    whole = sinkhorn._alternate(cost, start, 0.02, 25, 1 / cost.mean()).matrix
    for _ in range(25):
        result = sinkhorn._alternate(cost, start, 0.02, 1, 1 / cost.mean())
        start = result.potential
    torch.testing.assert_close(whole, result.matrix, rtol=1e-3, atol=1e-7)


def test_training_solve_is_accurate_enough() -> None:
    """What a training step gets without ever waiting for the device."""
    for name in ("correlation", "euclidean", "sqeuclidean"):
        cost = cost_between(cloud(128, 256, seed=3), cloud(256, 256, seed=4), name)[None]
        result = sinkhorn_plan(cost, 0.01, iterations=sinkhorn.TRAINING_ITERATIONS)
        assert result.marginal_error.item() <= 3e-2


def test_first_training_solve_needs_the_annealed_loop() -> None:
    """From a potential of zero as many updates leave the masses of rectified neurons further off."""
    scales = [torch.rand(rows, 1, generator=torch.Generator().manual_seed(rows)).exp() for rows in (256, 128)]
    y, x = (cloud(len(scale), 64, seed=3 + k).relu() * scale for k, scale in enumerate(scales))
    cost = cost_between(y, x)[None]
    cold, zero = (
        sinkhorn_plan(cost, 0.01, potential=start, iterations=sinkhorn.TRAINING_ITERATIONS).marginal_error.item()
        for start in (None, torch.zeros(1, 128))
    )
    assert cold < 0.5 * zero


@pytest.mark.parametrize("iterations", [None, 20])
def test_a_plan_holds_no_denormal_number(iterations: int | None) -> None:
    """Products with a converged plan of neurons that match took up to thirty times as long."""
    x = cloud(128, 64)
    y = x.flip(0) + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    cost = (1 - torch.corrcoef(torch.cat([y, x])).float()[:128, 128:])[None]
    matrix = sinkhorn_plan(cost, 0.01, iterations=iterations).matrix
    assert not bool(((matrix > 0) & (matrix < torch.finfo(torch.float32).tiny)).any())
    check_plan(matrix, 128, 128)


def test_kernel_holds_no_denormal_number() -> None:
    """They cost a CPU ten times the time of others, and hard costs are full of them."""
    cost = 100 * torch.rand(2, 32, 24)
    softmin = ScalingSoftmin(cost, torch.ones(2, 1, 1))
    softmin(0.005, torch.zeros(2, 24), "xy", torch.zeros(2, 24))
    loop = softmin.kernel
    assert (loop.amax(2) == 1).all()
    updates, _ = sinkhorn._updates(cost, torch.zeros(2, 24), 0.005, 5, torch.ones(2, 1, 1))
    for kernel in (loop, updates):
        assert kernel.min() >= math.exp(-41)


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
    for iterations in (None, sinkhorn.TRAINING_ITERATIONS):
        found = (sinkhorn_plan(cost, 0.01, iterations=iterations).matrix * cost).sum().item()
        assert found == pytest.approx(expected, rel=5e-3)


def test_a_given_number_of_iterations_never_waits_for_the_device() -> None:
    """A fake tensor has no values: whatever asks for one raises."""
    with FakeTensorMode():
        cost = torch.rand(2, 8, 6)
        cold = sinkhorn_plan(cost, 0.01, iterations=sinkhorn.TRAINING_ITERATIONS)
        sinkhorn_plan(cost, 0.01, potential=cold.potential, iterations=sinkhorn.TRAINING_ITERATIONS)
        with pytest.raises(DataDependentOutputException):
            sinkhorn_plan(cost, 0.01)


@pytest.mark.parametrize("iterations", [None, 5])
def test_geomloss_starts_what_has_no_potential(iterations: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of its loop for a whole batch, and none with a potential of an earlier solve."""
    calls: list[torch.Size] = []
    loop = geomloss_loop.run_geomloss_loop

    def counted(cost: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(cost.shape)
        return loop(cost, *args, **kwargs)

    monkeypatch.setattr(geomloss_loop, "run_geomloss_loop", counted)
    cost = random_cost(24, 16, batch=3)
    potential = sinkhorn_plan(cost, 0.05, iterations=iterations).potential
    assert calls == [(3, 24, 16)]
    sinkhorn_plan(cost, 0.05, iterations=iterations, potential=potential)
    assert len(calls) == 1


def test_a_cost_that_is_not_finite_leaves_the_others_of_its_batch_alone(solver: str) -> None:
    cost = random_cost(24, 16, batch=2)
    alone = sinkhorn_plan(cost[:1], 0.05, iterations=60)
    cost[1, 3, 5] = math.nan
    together = sinkhorn_plan(cost, 0.05, iterations=60)
    torch.testing.assert_close(together.matrix[0], alone.matrix[0], rtol=0, atol=1e-3 * alone.matrix.max().item())
    assert together.marginal_error[1].isnan()
