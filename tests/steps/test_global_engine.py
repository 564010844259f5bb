"""The global batch: traffic, state, errors and processes that disagree or die."""

from __future__ import annotations

import math
import os
import re
import signal
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_problem import LAYERS, assert_close, batch, net
from engines import COSTS, OneRank, call, draw, make
from lightning_utilities.core.apply_func import apply_to_collection
from processes import run_processes
from torch import Tensor, nn

from lightning_otrt import LogitDistillation, RepresentationTransfer
from lightning_otrt.steps.engine import TransportEngine
from lightning_otrt.steps.global_engine import GlobalTransportEngine
from lightning_otrt.steps.settings import TermSettings


def errors() -> dict[str, str]:
    """What each kind of bad input says."""
    rank = dist.get_rank()

    def attempt(x: Tensor, layers: Any = LAYERS, **options: Any) -> str:
        student = net(4, seed=1)
        transfer = RepresentationTransfer(net(6, seed=2), layers, **options)
        try:
            with transfer.attached(student):
                student(x)
                transfer.loss()
        except ValueError as error:
            return str(error)
        return ""

    x, _ = batch(0, (4,))
    poisoned = x.clone()
    poisoned[2] = float("nan")
    return {
        "finite": attempt(poisoned if rank == 1 else x),
        "few": attempt(x[:1]),
        "few for a regression": attempt(x[:1], weight=0, distillation=LogitDistillation(features="3")),
        "layers": attempt(x, LAYERS if rank == 0 else {"3": "3"}),
        "weights": attempt(x, epsilon=0.02 if rank == 0 else 0.01),
        "callable": attempt(x, cost=torch.cdist),
        "alone": attempt(x[:3], cost=torch.cdist, global_batch=False),
    }


def test_errors_are_the_same_on_all() -> None:
    found = run_processes(2, errors)
    assert found[0] == found[1]
    said = found[0]
    assert "Process 1 of 2: Teacher layer '0' has" in said["finite"]
    assert "'3' -> '3' has 2 observations" in said["few"]
    assert "logits has 2 observations, and needs at least 3" in said["few for a regression"]
    assert "disagree on the layers" in said["layers"]
    assert "but process 1 has" in said["layers"]
    assert "disagree on the plan" in said["weights"]
    assert "global_batch=False" in said["callable"]
    assert said["alone"] == ""


def count_traffic(options: dict[str, Any]) -> list[list[int]]:
    """Bytes of each collective, by call, after the first call."""
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    student, teacher = nn.Sequential(nn.Linear(5, 7)), nn.Sequential(nn.Linear(5, 11))
    transfer = RepresentationTransfer(teacher, {"0": "0"}, **options)
    calls = []
    dist.all_reduce = counted
    try:
        with transfer.attached(student):
            for call in range(4):
                sent.clear()
                x, _ = torch.randn(20, 5, generator=torch.Generator().manual_seed(call)), None
                student(x)
                transfer.loss().backward()
                calls.append(list(sent))
    finally:
        dist.all_reduce = all_reduce
    return calls


def test_bytes() -> None:
    n, m, single, double = 7, 11, 4, 8
    count = 1  # observations of the view, sent along in each exchange
    solve = {
        # All in the type of the moments.
        "correlation": [double * (count + 1 + 1 + 2 * (n + m) + n * m)],
        "sqeuclidean": [single * (count + 2 + 1 + 1 + n * m)],
        "euclidean": [single * (count + 2 + 1 + 1 + n * m)],
    }
    between = {
        "correlation": [double * (count + 3 * (n + m)), single * n],
        "sqeuclidean": [single * (count + 2 + 1 + 1 + 2)],
        "euclidean": [single * (count + 2 + n * m + 1 + 2)],
    }
    for cost in COSTS:
        found = run_processes(2, count_traffic, {"cost": cost, "memory": 0})
        assert found[0] == found[1]
        reference = [double * (1 + n + m)]
        assert found[0] == [reference + solve[cost], solve[cost], solve[cost], between[cost]]
    # A rotation needs the moments of its targets, too, which follow from no sum that is there before it is solved.
    [found, _] = run_processes(2, count_traffic, {"plan": "orthogonal", "memory": 0})
    moments = double * 6 * n
    solving = [*solve["correlation"], moments]
    assert found == [reference + solving, solving, solving, [double * count + moments]]


def quarrel() -> tuple[str, Any]:
    """Rank 1 solves another plan than rank 0."""
    import lightning_otrt.steps.entropic_coupling as solver

    solve = solver.sinkhorn_plan

    def other(cost: Tensor, *args: Any, **kwargs: Any) -> Any:
        plan = solve(cost, *args, **kwargs)
        return plan._replace(matrix=plan.matrix.roll(dist.get_rank(), 1)) if hasattr(plan, "_replace") else plan

    solver.sinkhorn_plan = other
    student = net(4, seed=1)
    transfer = RepresentationTransfer(net(6, seed=2), LAYERS)
    with transfer.attached(student), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in range(3):
            student(batch(call, (8,))[0])
            transfer.loss()
    return str(caught[0].message), [pair.plan.matrix for pair in transfer.engine.states]


def test_plans_come_from_the_first_where_they_differ() -> None:
    (said, plans), (_, others) = run_processes(2, quarrel)
    assert "differ in some bits" in said
    assert all(torch.equal(a, b) for a, b in zip(plans, others, strict=True))


def without_a_forward(options: dict[str, Any]) -> list[float]:
    student = net(4, seed=1)
    transfer = RepresentationTransfer(net(6, seed=2), LAYERS, strict=False, **options)
    terms = []
    with transfer.attached(student), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in range(3):
            if call != 1 or dist.get_rank() == 0:
                student(batch(call, (8,))[0])
            terms.append(transfer.loss().item())
    return terms


@pytest.mark.parametrize(
    "options", [{}, {"distillation": 1.0}, {"distillation": LogitDistillation(features="3"), "weight": 0}]
)
def test_strict_false_leaves_the_term_out_on_all(options: dict[str, Any]) -> None:
    terms, others = run_processes(2, without_a_forward, options)
    assert terms == others
    assert terms[1] == 0
    assert terms[0] > 0
    assert terms[2] > 0


def distilled_otherwise(options: dict[str, Any], views: int = 1, value: float | None = None) -> str:
    """The error of a call in which process 1 has more forwards, another option or a value of its own."""
    is_other = dist.get_rank() == 1
    option = LogitDistillation(**(options if is_other else {"features": options.get("features")}))
    student = net(4, seed=1)
    transfer = RepresentationTransfer(net(6, seed=2), LAYERS, weight=0, distillation=option)
    with transfer.attached(student):
        for _ in range(views if is_other else 1):
            x = batch(0, (8,))[0]
            student(x if value is None or not is_other else x.fill_(value))
        try:
            transfer.loss()
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("features", [None, "3"])
@pytest.mark.parametrize(
    ("other", "words"),
    [
        ([{}, 2], "disagree on the forwards in a call .*: process 0 has 1, but process 1 has 2"),
        ([{"temperature": 2.0}], "disagree on the temperature"),
        ([{}, 1, float("nan")], "Process 1 of 2: The logits of the student, .*NaN"),
    ],
)
def test_processes_that_distil_otherwise(features: str | None, other: list[Any], words: str) -> None:
    options, *more = other
    for said in run_processes(2, distilled_otherwise, {"features": features, **options}, *more):
        assert re.match(f"(The processes of the global batch )?{words}", said)


def without_a_gradient(layers: dict[str, str], features: str) -> list[tuple[float | None, float | None]]:
    """The first layer of process 1 is frozen in its second call."""
    student, found = net(4, seed=1), []
    option = LogitDistillation(features=features)
    transfer = RepresentationTransfer(net(6, seed=2), layers, strict=False, distillation=option)
    with transfer.attached(student), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in range(3):
            student[0].requires_grad_(call != 1 or dist.get_rank() == 0)
            student(batch(call, (8,))[0])
            transfer.loss()
            values = (transfer.transport_value, transfer.distillation_value)
            found.append(tuple(None if value is None else value.item() for value in values))
    return found


@pytest.mark.parametrize(("layers", "features", "left"), [({"0": "0"}, "3", 0), ({"3": "3"}, "0", 1)])
def test_strict_false_leaves_one_term_out_on_all(layers: dict[str, str], features: str, left: int) -> None:
    values, others = run_processes(2, without_a_gradient, layers, features)
    assert values == others
    for number, both in enumerate(values):
        assert [value is None for value in both] == [number == 1 and place == left for place in (0, 1)]


def terms_of(transfer: RepresentationTransfer, student: nn.Module, calls: range, part: slice) -> list[Tensor]:
    terms = []
    for number in calls:
        student(batch(number, (8,))[0][part])
        terms.append(transfer.loss().detach())
    return terms


def tensors_of(state: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(state, Tensor, found.append)
    return found


def save_between_solves() -> tuple[Any, list[Tensor], list[str]]:
    student = net(4, seed=1)
    transfer = RepresentationTransfer(net(6, seed=2), LAYERS, memory=0.9, solve_every=20, cost="euclidean")
    part = slice(5) if dist.get_rank() == 0 else slice(5, 8)
    with transfer.attached(student), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        terms_of(transfer, student, range(7), part)
        transfer.state_dict()
        transfer.synchronize()
        state = transfer.state_dict()
        return state, terms_of(transfer, student, range(7, 11), part), [str(each.message) for each in caught]


def test_state_of_all_is_resumed_by_one() -> None:
    (state, after, said), (other, _, _) = run_processes(2, save_between_solves)
    assert len(said) == 1
    assert "Call `synchronize()` on all processes" in said[0]
    assert all(map(torch.equal, tensors_of(state), tensors_of(other)))
    student = net(4, seed=1)
    transfer = RepresentationTransfer(net(6, seed=2), LAYERS, memory=0.9, solve_every=20, cost="euclidean")
    transfer.load_state_dict(state)
    with transfer.attached(student):
        assert_close(terms_of(transfer, student, range(7, 11), slice(None)), after)


def die() -> str:
    student = net(4, seed=1)
    transfer = RepresentationTransfer(net(6, seed=2), LAYERS)
    with transfer.attached(student):
        for call in range(4):
            if call == 2 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            student(batch(call, (8,))[0])
            try:
                transfer.loss()
            except RuntimeError as error:
                return str(error)
    return "went on"


def test_a_process_that_is_killed_ends_the_others() -> None:
    said, nothing = run_processes(2, die, dies=True)
    assert nothing is None
    assert said != "went on"


def resumed_globally(saved: TransportEngine, memory: float | str) -> GlobalTransportEngine:
    settings = TermSettings(saved.cost, memory=memory, solve_every=3)
    engine = GlobalTransportEngine([("s0", "t0")], [1.0], settings, ranks=OneRank())
    engine.load_state_dict(saved.state_dict(), torch.device("cpu"))
    return engine


def test_a_bad_batch_after_a_resume_does_not_spoil_the_reference_of_all() -> None:
    saved = make()
    for seed in range(4):
        call(saved, draw(seed=seed))
    engine = resumed_globally(saved, 0.0)
    bad = draw(seed=4)
    bad[1][0, 0] = math.nan
    call(engine, bad)
    assert all(call(engine, draw(seed=seed)).isfinite() for seed in range(5, 12))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("due", [True, False])
def test_a_bad_batch_after_a_resume_does_not_spoil_the_running_sums_of_all(cost: str, due: bool) -> None:
    saved = make(cost)
    for seed in range(3 if due else 4):
        call(saved, draw(seed=seed))
    engine = resumed_globally(saved, 0.98)
    bad = draw(seed=4)
    bad[1][0, 0] = math.nan
    call(engine, bad)
    before = engine.states[0].plan.matrix.clone()
    for seed in range(5, 12):
        call(engine, draw(seed=seed))
    assert all(part.isfinite().all() for part in engine.states[0].sums)
    assert not torch.equal(engine.states[0].plan.matrix, before)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("memory", [0.0, 0.98])
def test_a_global_run_goes_on_in_another_precision(cost: str, memory: float) -> None:
    saved = resumed_globally(make(cost), memory)
    for seed in range(3):
        call(saved, tuple(side.detach().double() for side in draw(seed=seed)))
    engine = resumed_globally(saved, memory)
    for seed in range(3, 10):
        assert call(engine, draw(seed=seed)).isfinite()


@pytest.mark.parametrize(("observations", "chosen"), [(8, 0.98), (40, 0.0)])
def test_auto_chooses_anew_for_all_after_a_resume_with_another_memory(observations: int, chosen: float) -> None:
    saved = make(memory=0.9)
    call(saved, draw(observations=observations))
    engine = resumed_globally(saved, "auto")
    call(engine, draw(observations=observations, seed=1))
    assert engine.states[0].memory == chosen


def test_auto_chooses_after_a_resume_only_for_pairs_that_never_ran() -> None:
    saved = make(pairs=2, memory="auto")
    call(saved, draw(observations=8), draw(observations=8))
    state = saved.state_dict()
    state["pairs"][1] |= {"memory": None, "plan": None, "parts": None, "sums": None, "has_run": False}
    settings = TermSettings(saved.cost, memory="auto", solve_every=10)
    engine = GlobalTransportEngine(saved.names, saved.weights, settings, ranks=OneRank())
    engine.load_state_dict(state, torch.device("cpu"))
    call(engine, draw(observations=40, seed=1), draw(observations=40, seed=2))
    assert [each.memory for each in engine.states] == [0.98, 0.0]


@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_pair_that_begins_with_a_batch_that_is_not_finite_recovers(cost: str, bad: float) -> None:
    """Its first batch was skipped, so that the check of the first call did not see the second."""
    local = make(cost, memory=0.98, solve_every=1)
    settings = TermSettings(local.cost, memory=0.98, solve_every=1)
    both = local, GlobalTransportEngine(local.names, local.weights, settings, ranks=OneRank())
    found = []
    for engine in both:
        engine.calls = 1
        y, x = draw(seed=1)
        x[0, 0] = bad
        call(engine, (y, x))
        found.append([call(engine, draw(seed=seed)).detach() for seed in (2, 3)])
        assert engine.states[0].energy.isfinite().all()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)
    assert all(value > 0 for value in found[0])
