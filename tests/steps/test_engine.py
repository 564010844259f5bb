"""The term of a call, values that are not finite, and the state of a run."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from engines import COSTS, TERMS, assert_same_state, call, draw, make
from torch import Tensor

from lightning_otrt.steps.engine import TransportEngine
from lightning_otrt.steps.settings import TermSettings
from lightning_otrt.transport.cost import Plan
from lightning_otrt.transport.diagnostics import diagnose
from lightning_otrt.transport.named_costs import get_cost


def transported(cost: str, y: Tensor, x: Tensor, plan: Tensor) -> Tensor:
    """⟨P, M⟩ by torch's own distances and correlations, for autograd."""
    if cost == "correlation":
        matrix = 1 - torch.corrcoef(torch.cat([y, x]))[: len(y), len(y) :]
    else:
        matrix = torch.cdist(y, x) / (x.square().mean() * x.shape[1]).sqrt()
        matrix = matrix.square() if cost == "sqeuclidean" else matrix
    return (plan * matrix).sum()


@pytest.mark.parametrize("cost", COSTS)
def test_term_and_gradient_are_those_of_the_weighted_mean_over_views(cost: str) -> None:
    """With the plans that the engine has, in a call that solves and in one that does not."""
    names, weights = [("a", "b"), ("c", "d")], [0.25, 0.75]
    engine = TransportEngine(names, weights, TermSettings(get_cost(cost), epsilon=0.02))
    for number in range(4):
        views = [
            [draw(6, 5, seed=4 * number + view, dtype=torch.float64), draw(4, 7, seed=50 - number, dtype=torch.float64)]
            for view in range(2)
        ]
        # The scale of the teacher is a running one over calls and views: this makes it the same in each.
        views = [[(y, x * (x.numel() ** 0.5 / x.norm())) for y, x in pairs] for pairs in views]
        inputs = [pairs[index][0] for pairs in views for index in range(2)]
        term, distances = engine.term(views, 80)
        gradients = torch.autograd.grad(term, inputs)
        values = [[transported(cost, *pairs[index], distances[index].plan) for pairs in views] for index in range(2)]
        expected = sum(weight * sum(parts) / 2 for weight, parts in zip(weights, values, strict=True))
        torch.testing.assert_close(term, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs), rtol=1e-7, atol=1e-10)
        for distance, parts, name in zip(distances, values, names, strict=True):
            torch.testing.assert_close(distance.value, sum(parts).detach() / 2, rtol=1e-9, atol=0)
            assert (distance.name, distance.memory, distance.observations) == (name[0], 0.0, 80)


@pytest.mark.parametrize(("plan", "shown"), [("exact", "plan"), ("orthogonal", "rotation")])
def test_a_distance_shows_its_value_and_no_entries(plan: str, shown: str) -> None:
    engine = make(plan=plan)
    _, (distance,) = engine.term([[draw()]], 80)
    size = tuple(distance.matrix.shape)
    assert repr(distance) == f"PairDistance('s0', {float(distance.value):.4g}, {shown} {size}, 40 observations)"


def test_a_skipped_pair_has_no_value_and_no_share() -> None:
    engine = make(pairs=2, strict=False)
    pairs = [draw(observations=2), draw(seed=1)]
    with pytest.warns(UserWarning, match="'s0' -> 't0' has 2 observations"):
        term, (skipped, other) = engine.term([pairs], 2)
    assert skipped.plan is None
    assert repr(skipped) == "PairDistance('s0', skipped, no plan, 2 observations)"
    assert skipped.value.isnan()
    assert skipped.observations == 2
    torch.testing.assert_close(term, other.value / 2)
    term.backward()
    assert pairs[0][0].grad is None
    assert engine.bad_calls == 0


def test_a_call_with_too_few_observations_throughout_has_no_term() -> None:
    engine = make(strict=False)
    with pytest.warns(UserWarning, match="2 observations"):
        assert call(engine, draw(observations=2)) == 0


@pytest.mark.parametrize("cost", TERMS)
def test_gradient_has_the_layout_of_the_neurons(cost: str) -> None:
    """Row operations on two memory layouts are ten times slower."""
    y, x = draw()
    turned = y.detach().mT.contiguous().mT.requires_grad_()
    for student in (y, turned):
        (gradient,) = torch.autograd.grad(call(make(cost), (student, x)), student)
        assert gradient.stride() == student.stride()


def test_plan_between_solves_is_that_of_the_last_one() -> None:
    engine = make()
    for number in range(9):
        call(engine, draw(seed=number, dtype=torch.float64))
    plan = engine.states[0].plan.matrix.clone()
    y, x = draw(seed=9, dtype=torch.float64)
    loss = call(engine, (y, x))
    assert torch.equal(engine.states[0].plan.matrix, plan)
    torch.testing.assert_close(loss, transported("correlation", y, x, plan), rtol=1e-9, atol=0)


@pytest.mark.parametrize("cost", TERMS)
@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_batch_leaves_no_trace(cost: str, memory: float, side: int, bad: float) -> None:
    engine = make(cost, memory=memory, solve_every=1)
    call(engine, draw(seed=0))
    before = copy.deepcopy(engine.state_dict())["pairs"]
    pair = draw(seed=1)
    pair[side].data[2, 3] = bad
    assert not call(engine, pair).isfinite()
    after = engine.state_dict()["pairs"]
    # A teacher that is finite does tell its scale; a running cost does not know of the batch, and may be solved again.
    for key in ("sums", *(["energy"] if side else []), *([] if memory else ["plan", "potential"])):
        torch.testing.assert_close(after[0][key], before[0][key], rtol=0, atol=0)
    assert engine.bad_calls == 1
    assert call(engine, draw(seed=2)).isfinite()
    assert engine.bad_calls == 1


@pytest.mark.parametrize("cost", TERMS)
@pytest.mark.parametrize("side", [0, 1])
def test_a_later_batch_whose_squares_overflow_is_counted_and_keeps_the_plan(cost: str, side: int) -> None:
    engine = make(cost, solve_every=1)
    call(engine, draw())
    plan = engine.states[0].plan.matrix.clone()
    pair = draw(seed=1)
    with torch.no_grad():
        pair[side][1, 2] = 1e25
    assert not call(engine, pair).isfinite()
    assert torch.equal(engine.states[0].plan.matrix, plan)
    assert int(engine.bad_calls) == 1


def test_a_plan_that_is_not_finite_is_not_kept() -> None:
    """The mean of such a cost is finite, but one over it is not."""
    engine = make(lambda y, x: torch.cdist(y, x) * 1e-39, solve_every=1)
    for seed in range(2):
        call(engine, draw(seed=seed))
        assert engine.states[0].plan.matrix.isfinite().all()
        assert engine.states[0].potential.isfinite().all()


@pytest.mark.parametrize("cost", TERMS)
def test_a_pair_that_begins_with_a_batch_that_is_not_finite_recovers(cost: str) -> None:
    """Its first batch was skipped, so that the check of the first call did not see the second."""
    engine = make(cost, memory=0.98, solve_every=1, strict=False)
    if cost not in ("euclidean", "sqeuclidean"):
        with pytest.warns(UserWarning, match="2 observations"):
            call(engine, draw(observations=2))
    else:
        engine.calls = 1
    y, x = draw(seed=1)
    x[0, 0] = math.nan
    call(engine, (y, x))
    for seed in (2, 3):
        call(engine, draw(seed=seed))
    state = engine.states[0]
    assert state.energy is None or state.energy.isfinite().all()
    assert all(part.isfinite().all() for part in (*state.sums, *state.reference))
    if isinstance(state.plan, Plan):
        assert diagnose(state.plan.matrix).entropy < 0.9
    else:
        assert state.plan.directions > 0


@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize("cost", TERMS)
def test_a_run_goes_on_in_another_precision(cost: str, memory: float) -> None:
    engine = make(cost, memory=memory, solve_every=2)
    for seed in range(3):
        call(engine, draw(seed=seed))
    for seed in range(3, 6):
        y, x = (side.detach().double() for side in draw(seed=seed))
        loss = call(engine, (y.requires_grad_(), x))
        loss.backward()
        assert loss.dtype == y.grad.dtype == torch.float64
    assert engine.states[0].plan.matrix.dtype == torch.float64


@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize("cost", TERMS)
def test_resume_goes_on_as_if_it_had_not_stopped(cost: str, memory: float) -> None:
    straight = make(cost, memory=memory, solve_every=3)
    stopped = make(cost, memory=memory, solve_every=3)
    for number in range(5):
        call(straight, draw(seed=number)), call(stopped, draw(seed=number))
    saved = stopped.state_dict()
    before = copy.deepcopy(saved)
    resumed = make(cost, memory=memory, solve_every=3)
    resumed.load_state_dict(saved, torch.device("cpu"))
    for number in range(5, 10):
        expected, found = call(straight, draw(seed=number)), call(resumed, draw(seed=number))
        assert torch.equal(found, expected)
    assert_same_state(saved, before)


def test_state_is_not_changed_by_later_calls() -> None:
    engine = make(memory=0.9, solve_every=1)
    call(engine, draw())
    state = engine.state_dict()
    before = copy.deepcopy(state)
    call(engine, draw(seed=1))
    assert_same_state(state, before)


@pytest.mark.parametrize(
    "option", [{"cost": "euclidean"}, {"plan": "identity"}, {"plan": "static"}, {"plan": "orthogonal"}]
)
def test_state_of_another_cost_or_plan_is_refused(option: dict[str, Any]) -> None:
    """Else a control would go on with the plan of the run before, and sums of one cost would be taken for another's."""
    saved = make(**option)
    call(saved, draw(12, 12))
    [(name, value)] = option.items()
    name = f"{name}='{value}'"
    with pytest.raises(ValueError, match=name):
        make().load_state_dict(saved.state_dict(), torch.device("cpu"))


def test_state_of_other_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="layer pairs"):
        make().load_state_dict(make(pairs=2).state_dict(), torch.device("cpu"))
