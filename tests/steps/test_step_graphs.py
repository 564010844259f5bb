"""Calls as graphs, rehearsed on a CPU: the numbers of calls without one, to the last bit, and nothing that is stale."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from engines import TERMS, assert_same_state, call, draw, make
from recorded_graph import RecordedGraph
from torch import Tensor

from lightning_otrt.steps import step_graphs
from lightning_otrt.steps.engine import TransportEngine
from lightning_otrt.transport.custom_cost import CustomCost

pytestmark = pytest.mark.usefixtures("use_recorded_graphs")
Graphs = list[RecordedGraph]

CALLS = 14
#: Two pairs of equal shape, and one of another.
WIDTHS = ((12, 9), (12, 9), (7, 11))


def pairs_of(step: int, observations: int = 40) -> list[tuple[Tensor, Tensor]]:
    return [draw(*widths, observations, seed=10 * step + index) for index, widths in enumerate(WIDTHS)]


def train(engine: TransportEngine, calls: range = range(CALLS), views: int = 1) -> list[Tensor]:
    """Values of the terms and all gradients."""
    found = []
    for step in calls:
        batches = [pairs_of(100 * view + step) for view in range(views)]
        total, distances = engine.term(batches, 40 * views)
        total.backward()
        found += [total.detach(), *(distance.value for distance in distances)]
        found += [y.grad for pairs in batches for y, _ in pairs]
    return found


def without_graphs(*arguments: Any, **options: Any) -> TransportEngine:
    engine = make(*arguments, **options)
    engine.graphs.is_enabled = False
    return engine


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


@pytest.mark.parametrize("cost", TERMS)
@pytest.mark.parametrize(("memory", "solve_every", "views"), [(0.0, 1, 1), (0.0, 3, 2), (0.9, 3, 1), (0.9, 1, 2)])
def test_same_numbers(cost: str, memory: float, solve_every: int, views: int, use_recorded_graphs: Graphs) -> None:
    options = {"pairs": 3, "memory": memory, "solve_every": solve_every}
    engine, plain = make(cost, **options), without_graphs(cost, **options)
    assert_same(train(engine, views=views), train(plain, views=views))
    assert_same_state(engine.state_dict(), plain.state_dict())
    # Those with a solve, and those between.
    assert len(use_recorded_graphs) == (1 if solve_every == 1 else 2)
    assert sum(graph.replays for graph in use_recorded_graphs) >= 8


@pytest.mark.parametrize("plan", ["uniform", "random", "static", "exact"])
def test_other_plans(plan: str, use_recorded_graphs: Graphs) -> None:
    options = {"pairs": 3, "plan": plan, "solve_every": 5}
    engine, plain = make("sqeuclidean", **options), without_graphs("sqeuclidean", **options)
    assert_same(train(engine), train(plain))
    assert use_recorded_graphs, "calls that solve nothing are captured"


def test_a_cost_of_the_user_is_not_captured(use_recorded_graphs: Graphs) -> None:
    engine = make(CustomCost(lambda y, x: torch.cdist(y, x) / 10), pairs=3)
    train(engine)
    assert not use_recorded_graphs


def test_not_finite_batches(use_recorded_graphs: Graphs) -> None:
    """They leave plans and sums as they are, in a graph as without one."""
    found = []
    for engine in (make(memory=0.9, solve_every=2), without_graphs(memory=0.9, solve_every=2)):
        values = []
        for step in range(CALLS):
            y, x = draw(seed=step)
            if step in (11, 12):
                with torch.no_grad():
                    x[0, 0] = torch.nan
            values.append(call(engine, (y, x)).detach())
        found.append((values, engine.state_dict()))
    (own, own_state), (other, other_state) = found
    torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)
    assert_same_state(own_state, other_state)
    assert torch.stack(own).isnan().sum() == 2


def test_what_a_call_gave_stays(use_recorded_graphs: Graphs) -> None:
    """Values, plans and gradients of a call are not those of a later one, even before the backward pass."""
    engine, plain = make(pairs=3, solve_every=2), without_graphs(pairs=3, solve_every=2)
    kept = []
    for one in (engine, plain):
        train(one, range(12))
        batches = [pairs_of(step) for step in (12, 13, 14)]
        calls = [one.term([pairs], 40) for pairs in batches]
        torch.stack([total for total, _ in calls]).sum().backward()
        found = [y.grad for pairs in batches for y, _ in pairs]
        kept.append(
            [*found, *(part for _, distances in calls for one in distances for part in (one.value, one.matrix))]
        )
    assert_same(*kept)
    assert use_recorded_graphs


def test_a_state_that_was_loaded(use_recorded_graphs: Graphs) -> None:
    """The sums are other tensors then. The graph of the old ones is not replayed."""
    options = {"pairs": 3, "memory": 0.9, "solve_every": 3}
    engine, plain = make(**options), without_graphs(**options)
    for one in (engine, plain):
        train(one, range(10))
        saved = copy.deepcopy(one.state_dict())
        train(one, range(10, 14))
        one.load_state_dict(saved, torch.device("cpu"))
    made = len(use_recorded_graphs)
    assert_same(train(engine, range(20, 34)), train(plain, range(20, 34)))
    assert len(use_recorded_graphs) > made


def test_other_shapes_have_other_graphs(use_recorded_graphs: Graphs) -> None:
    found = []
    for engine in (make(solve_every=3), without_graphs(solve_every=3)):
        found.append([])
        for step in range(24):
            y, x = draw(observations=40 if step % 3 else 17, seed=step)
            found[-1].append(call(engine, (y, x)).detach())
    assert_same(*found)
    assert len(use_recorded_graphs) > 1


def test_pairs_that_are_absent(use_recorded_graphs: Graphs) -> None:
    """A layer that training skips at times changes what is computed together."""
    found = []
    for engine in (make(pairs=3, memory=0.9), without_graphs(pairs=3, memory=0.9)):
        values = []
        for step in range(30):
            pairs, absent = pairs_of(step), ()
            if step % 4 == 3:
                absent = (1,)
                pairs[1] = tuple(side[:, :0] for side in pairs[1])
            values.append(engine.term([pairs], 40, absent=absent)[0].detach())
        found.append(values)
    assert_same(*found)
    assert len(use_recorded_graphs) <= step_graphs.MOST_CAPTURES


def test_shapes_that_never_settle_capture_nothing(use_recorded_graphs: Graphs) -> None:
    engine = make()
    for step in range(30):
        call(engine, draw(observations=20 + step, seed=step))
    assert not use_recorded_graphs


def test_reevaluations(use_recorded_graphs: Graphs) -> None:
    """The closures of LBFGS change no plan and no sum."""
    engine, plain = make(memory=0.9), without_graphs(memory=0.9)
    found = []
    for one in (engine, plain):
        values = []
        for step in range(12):
            values += [call(one, draw(seed=step), reevaluation=number > 0).detach() for number in range(3)]
        found.append(values)
    assert_same(*found)
    assert_same_state(engine.state_dict(), plain.state_dict())
    assert use_recorded_graphs


def test_a_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told once, and the calls go on without graphs."""

    def fails(self: RecordedGraph, pool: Any) -> Any:
        raise RuntimeError("CUDA error.")

    monkeypatch.setattr(RecordedGraph, "capturing", fails)
    engine, plain = make(pairs=3), without_graphs(pairs=3)
    with pytest.warns(UserWarning, match=r"could not be captured in a CUDA graph: CUDA error\. It runs") as caught:
        found = train(engine)
    assert len(caught) == 1
    assert_same(found, train(plain))


def test_a_failure_frees_the_graphs_before(use_recorded_graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one for want of memory."""
    engine = make(pairs=3)
    train(engine, range(6))
    assert len(engine.graphs._captured) == 1

    def fails(self: RecordedGraph, pool: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(RecordedGraph, "capturing", fails)
    with pytest.warns(UserWarning, match="could not be captured"):
        train(engine, range(6, 14))
    assert not engine.graphs._captured


def test_sums_that_are_not_changed_in_place(use_recorded_graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of very many observations. Such calls run without graphs, and nothing is said."""
    monkeypatch.setattr("lightning_otrt.transport.correlation.is_long", lambda y: True)
    engine, plain = make(memory=0.9), without_graphs(memory=0.9)
    found = [[call(one, draw(seed=step)).detach() for step in range(16)] for one in (engine, plain)]
    assert_same(*found)
    assert_same_state(engine.state_dict(), plain.state_dict())
    assert engine.graphs.is_enabled
    assert not engine.graphs._captured


def test_a_kind_that_is_lost_again_and_again_is_left_alone(use_recorded_graphs: Graphs) -> None:
    engine = make(memory=0.9, solve_every=1)
    for step in range(60):
        call(engine, draw(seed=step))
        if step % 5 == 4:
            engine.load_state_dict(engine.state_dict(), torch.device("cpu"))
    assert len(use_recorded_graphs) == step_graphs.MOST_LOSSES
    assert not engine.graphs._captured


def test_a_new_pool_where_no_graph_holds_the_last(use_recorded_graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[int] = []
    monkeypatch.setattr(step_graphs, "graph_pool", lambda: pools.append(len(pools)) or len(pools))
    engine = make(memory=0.9, solve_every=1)
    for step in range(20):
        call(engine, draw(seed=step))
        if step == 9:
            engine.load_state_dict(engine.state_dict(), torch.device("cpu"))
    assert len(pools) == len(use_recorded_graphs) == 2


def test_kinds_are_counted_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graphs, "MOST_KINDS", 5)
    engine = make()
    for step in range(30):
        call(engine, draw(observations=20 + step, seed=step))
    assert len(engine.graphs._seen) <= 5


def test_copies_make_their_own(use_recorded_graphs: Graphs) -> None:
    """Graphs can be neither copied nor pickled, and belong to one run."""
    engine = make(pairs=3, memory=0.9)
    train(engine)
    other = copy.deepcopy(engine)
    pickle.loads(pickle.dumps(engine.graphs))
    made = len(use_recorded_graphs)
    later = range(CALLS, 2 * CALLS)
    assert_same(train(other, later), train(engine, later))
    assert len(use_recorded_graphs) > made


def test_reset_forgets_them(use_recorded_graphs: Graphs) -> None:
    engine = make()
    first = [call(engine, draw(seed=step)).detach() for step in range(12)]
    made = len(use_recorded_graphs)
    engine.reset()
    assert_same([call(engine, draw(seed=step)).detach() for step in range(12)], first)
    assert len(use_recorded_graphs) == 2 * made > 0
