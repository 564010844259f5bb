"""When plans are solved, from which statistics, and how well."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engines import COSTS, TERMS, assert_same_state, call, draw, make
from operations import operations
from torch import Tensor

from lightning_otrt.steps import entropic_coupling
from lightning_otrt.steps.coupling import EARLY_SOLVES
from lightning_otrt.steps.engine import TransportEngine
from lightning_otrt.transport.cost import Plan
from lightning_otrt.transport.diagnostics import diagnose
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.plans import exact_plan
from lightning_otrt.transport.sinkhorn import sinkhorn_plan


def solved_calls(engine: TransportEngine, count: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[int]:
    solved: list[int] = []

    def counted(cost: Tensor, *args: Any, **kwargs: Any) -> Any:
        solved.append(engine.calls)
        return sinkhorn_plan(cost, *args, **kwargs)

    monkeypatch.setattr(entropic_coupling, "sinkhorn_plan", counted)
    for number in range(count):
        call(engine, draw(seed=number), **options)
    return solved


def test_solve_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    assert solved_calls(make(), 41, monkeypatch) == [*EARLY_SOLVES, 10, 20, 30, 40]
    assert solved_calls(make(solve_every=1), 5, monkeypatch) == [0, 1, 2, 3, 4]
    assert solved_calls(make(solve_every=3), 10, monkeypatch) == [0, 1, 2, 3, 4, 6, 8, 9]


def solved_sizes(engine: TransportEngine, sizes: Sequence[int]) -> list[int]:
    """The calls that bring a new plan, from batches of these sizes."""
    solved = []
    for number, size in enumerate(sizes):
        before = engine.states[0].plan
        call(engine, draw(observations=size, seed=number))
        after = engine.states[0].plan
        if after is not None and (before is None or not torch.equal(after.matrix, before.matrix)):
            solved.append(number)
    return solved


@pytest.mark.parametrize("term", [name for name in TERMS if not name.startswith("random")])
def test_a_far_smaller_batch_solves_no_plan(term: str) -> None:
    """The last batch of an epoch would decide for many calls."""
    epochs = [40, 40, 19] * 3  # due in calls 0, 1, 2, 4 and 8
    assert solved_sizes(make(term), epochs) == [0, 1, 4]
    assert solved_sizes(make(term, solve_every=1), epochs) == [0, 1, 3, 4, 6, 7]
    assert solved_sizes(make(term, memory=0.9), epochs) == [0, 1, 2, 4, 8]  # earlier batches are in it, too


def test_what_counts_as_a_far_smaller_batch() -> None:
    assert solved_sizes(make(solve_every=1), [40, 20, 10, 4, 40]) == [0, 1, 2, 4]
    # A batch size that changes in a run holds up one solve, not all.
    assert solved_sizes(make(solve_every=1), [40, 15, 15, 15, 15]) == [0, 2, 3, 4]
    # Not twice in a row, however small the second one is.
    assert solved_sizes(make(solve_every=1), [40, 15, 5]) == [0, 2]
    # Without a plan there is nothing to go on with.
    engine = make(solve_every=1)
    call(engine, draw(observations=40))
    engine.states[0].plan = None
    assert solved_sizes(engine, [15]) == [0]
    # The plan of a pair that runs for the first time in such a batch.
    engine = make(pairs=2, solve_every=1)
    nothing = draw(observations=0)
    engine.term([[draw(observations=40), nothing]], 40, absent=[1])
    engine.term([[draw(observations=15), draw(observations=15)]], 15)
    assert engine.states[1].plan is not None


def test_a_resumed_run_knows_how_large_batches_were() -> None:
    engine, resumed = make(solve_every=1), make(solve_every=1)
    call(engine, draw(observations=40))
    state = engine.state_dict()
    resumed.load_state_dict(state, torch.device("cpu"))
    assert solved_sizes(resumed, [15, 40]) == [1]
    # A checkpoint of an earlier version does not say it.
    resumed.load_state_dict({key: state[key] for key in state if key != "solved_samples"}, torch.device("cpu"))
    assert solved_sizes(resumed, [15, 40]) == [0, 1]


def test_reevaluation_keeps_plans_statistics_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(memory=0.9, solve_every=1)
    call(engine, draw())
    before = copy.deepcopy(engine.state_dict())
    assert solved_calls(engine, 3, monkeypatch, reevaluation=True) == []
    assert_same_state(engine.state_dict(), before)


def test_static_plan_is_solved_until_enough_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    # 40 samples a call: the plan is that of the first 280.
    assert solved_calls(make(plan="static"), 12, monkeypatch) == list(range(7))


def test_a_static_plan_starts_cold_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the potential of an earlier, smaller sample it can take longer to converge than it is given."""
    starts = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        starts.append(kwargs["potential"])
        return sinkhorn_plan(*args, **kwargs)

    monkeypatch.setattr(entropic_coupling, "sinkhorn_plan", watched)
    engine = make(plan="static")
    for seed in range(3):
        call(engine, draw(seed=seed))
    assert starts == [None, None, None]


@pytest.mark.parametrize("bad", [math.nan, 1e25])
def test_static_plan_counts_finite_samples_and_then_rests(bad: float) -> None:
    engine = make(plan="static")
    call(engine, draw(observations=100))
    for seed in range(5):
        y, x = draw(observations=100, seed=seed)
        x[0, 0] = bad
        call(engine, (y, x))
    assert engine.states[0].samples == 100
    for seed in (6, 7):
        call(engine, draw(observations=100, seed=seed))
    assert engine.states[0].samples == 300
    final = engine.states[0].plan.matrix.clone()
    after = operations(lambda: call(engine, draw(observations=100, seed=8)).backward())
    assert after.products == 1
    assert torch.equal(engine.states[0].plan.matrix, final)


def test_static_plan_has_converged_when_it_rests() -> None:
    """No later solve would improve it, and eight updates are far from the masses of groups of unlike sizes."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(4, 256, generator=generator)
    y = groups[torch.repeat_interleave(torch.tensor([40, 10, 10, 4]))]
    x = groups[torch.repeat_interleave(torch.tensor([16, 16, 16, 16]))]
    y, x = (side + 0.1 * torch.randn(side.shape, generator=generator) for side in (y, x))
    engine = make(plan="static")
    call(engine, (y.requires_grad_(), x))
    assert diagnose(engine.states[0].plan.matrix).teacher_error < 0.02


def test_training_solve_converges_over_calls() -> None:
    """Clusters, where masses flow far: the iterations of one call are not enough, those of several are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 64, generator=generator)
    y = (torch.randn(96, 64, generator=generator) + 3 * x[torch.arange(96) % 64]).requires_grad_()
    engine, errors = make(solve_every=1, epsilon=0.05), []
    for _ in range(40):
        call(engine, (y, x))
        errors.append(diagnose(engine.states[0].plan.matrix).teacher_error.item())
    assert errors[0] > 5 * errors[-1]


@pytest.mark.parametrize("cost", COSTS)
def test_training_plan_is_accurate(cost: str) -> None:
    """A single cold call against the exact value and the converged plan's gradient."""
    y, x = draw(96, 96, 512, seed=4)
    engine = make(cost)
    value = call(engine, (y, x))
    value.backward()
    state, rule = engine.states[0], get_cost(cost)
    matrix = rule.matrix(rule.sums(y.detach(), x), rule.energy(x))
    converged = sinkhorn_plan(matrix[None], 0.01).matrix[0]
    _, gradient = rule.value(y.detach(), x, Plan.of(converged), rule.energy(x))
    exact = (exact_plan(matrix[None])[0] * matrix).sum()
    # Of the entropic plan itself the value is up to ε log N of the mean off.
    assert value.item() == pytest.approx(exact.item(), rel=0.02)
    assert torch.cosine_similarity(y.grad.flatten(), gradient.flatten(), 0) >= 0.985
    torch.testing.assert_close(state.plan.matrix.sum(1), state.plan.student_mass, rtol=1e-5, atol=0)
    torch.testing.assert_close(state.plan.matrix.sum(0), state.plan.teacher_mass, rtol=1e-4, atol=1e-8)
    assert (state.plan.teacher_mass - 1 / 96).abs().sum() <= 3e-2


@pytest.mark.parametrize("cost", COSTS)
def test_running_cost_is_the_weighted_cost_of_all_batches(cost: str) -> None:
    engine, rule, decay = make(cost, memory=0.8), get_cost(cost), 0.8
    batches = [draw(seed=number) for number in range(5)]
    for pair in batches:
        call(engine, pair)
    # Observations weighted by their age: scaled by the root of the weight around the weighted mean.
    weights = torch.cat([torch.full((40,), decay ** (4 - number), dtype=torch.float64) for number in range(5)])
    y, x = (torch.cat([pair[side].detach().double() for pair in batches], 1) for side in (0, 1))
    if cost == "correlation":
        y, x = (side - (side * weights).sum(1, keepdim=True) / weights.sum() for side in (y, x))
        moments = (y * weights) @ x.mT
        norms = [(side.square() * weights).sum(1).sqrt() for side in (y, x)]
        expected = 1 - moments / norms[0][:, None] / norms[1][None]
    else:
        squares = (weights * (y[:, None] - x[None]).square()).sum(-1) / weights.sum()
        expected = squares.sqrt() if cost == "euclidean" else squares
    state = engine.states[0]
    found = rule.matrix(state.sums, torch.ones(2)).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_memory_is_chosen_by_the_number_of_samples() -> None:
    for samples, expected in ((8, 0.98), (11, 0.98), (12, 0.0), (40, 0.0)):
        engine = make(memory="auto")
        # Four positions of each: they are observations, but not independent ones.
        engine.term([[draw(observations=4 * samples)]], samples)
        assert engine.states[0].memory == expected
        assert (engine.states[0].sums is None) == (expected == 0)


def test_plan_of_a_running_cost_is_better_than_that_of_a_small_batch() -> None:
    """Teacher neurons in another order, seen through 4 samples a call: more calls find the order, one cannot."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(24, generator=generator)
    found = {}
    for memory in (0.0, 0.98):
        engine = make(memory=memory, solve_every=1)
        for _ in range(40):
            x = torch.randn(24, 4, generator=generator)
            call(engine, (x[order].clone().requires_grad_(), x + 1.5 * torch.randn(x.shape, generator=generator)))
        found[memory] = engine.states[0].plan.matrix[torch.arange(24), order].sum().item()
    assert found[0.98] > 0.9 > 0.5 > found[0.0]


@pytest.mark.parametrize("cost", COSTS)
def test_running_cost_over_batches_below_and_above_the_limit_of_float64(
    cost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = [draw(observations=count, seed=count) for count in (20, 40, 30, 50, 10)]
    expected = make(cost, memory=0.9, solve_every=1)
    found = make(cost, memory=0.9, solve_every=1)
    for pair in sides:
        call(expected, pair)
    monkeypatch.setattr("lightning_otrt.transport.tensors.FLOAT64_OBSERVATIONS", 35)
    for pair in sides:
        call(found, pair)
    torch.testing.assert_close(
        [part.double() for part in found.states[0].sums],
        [part.double() for part in expected.states[0].sums],
        rtol=1e-4,
        atol=1e-3,
    )
    torch.testing.assert_close(found.states[0].plan.matrix, expected.states[0].plan.matrix, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("saved", "given", "used"), [
    (0.9, 0.5, 0.5),
    (0.9, 0.0, 0.0),
    (0.0, 0.9, 0.9),
    (0.9, "auto", 0.0),  # what "auto" chooses here
    ("auto", "auto", 0.0),
])  # fmt: skip
def test_a_resumed_run_takes_the_memory_that_it_is_given(saved: Any, given: Any, used: float) -> None:
    before, after = make(memory=saved), make(memory=given)
    call(before, draw())
    after.load_state_dict(before.state_dict(), torch.device("cpu"))
    call(after, draw(seed=1)).backward()
    assert after.states[0].memory == used
    assert (after.states[0].sums is not None) == bool(used)
