"""The term of a batch that lies on several processes: value, gradients and state against one process with all of it."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_problem import LAYERS, TOLERANCE, assert_close, batch, net
from processes import run_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from lightning_otrt import RepresentationTransfer

COSTS = ("correlation", "euclidean", "sqeuclidean")
EVEN = {2: (6, 6), 4: (3, 3, 3, 3)}
#: One sample carries no correlation of its own; the last has more than all others together.
UNEVEN = {2: (1, 11), 4: (1, 2, 1, 8)}
ACCUMULATE = 2
STEPS = 5


def train(options: dict[str, Any], sizes: Sequence[int], distributed: bool) -> dict[str, Any]:
    """Five steps of two micro-batches: terms, gradients of each step and final weights."""
    rank = dist.get_rank() if distributed else 0
    student = net(4, seed=1)
    model = DistributedDataParallel(student) if distributed else student
    transfer = RepresentationTransfer(net(6, seed=2), LAYERS, weight=2.0, **options)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    terms, gradients = [], []
    with transfer.attached(model):
        for call in range(ACCUMULATE * STEPS):
            x, y = batch(call, sizes)
            if distributed:
                x, y = x.split(list(sizes))[rank], y.split(list(sizes))[rank]
            last = call % ACCUMULATE == ACCUMULATE - 1
            with nullcontext() if last or not distributed else model.no_sync():
                # The task loss of all samples, too, once DDP has averaged.
                loss = nn.functional.cross_entropy(model(x), y, reduction="sum") / sum(sizes)
                term = transfer.loss()
                terms.append(term.detach())
                ((loss * (len(sizes) if distributed else 1) + term) / ACCUMULATE).backward()
            if last:
                gradients.append([p.grad.clone() for p in student.parameters()])
                optimizer.step()
                optimizer.zero_grad()
        transfer.synchronize()
    return {
        "terms": torch.stack(terms),
        "gradients": gradients,
        "weights": [p.detach().clone() for p in student.parameters()],
        "state": transfer.state_dict(),
    }


def train_all(settings: Sequence[dict[str, Any]], sizes: Sequence[int]) -> list[dict[str, Any]]:
    return [train(options, sizes, distributed=True) for options in settings]


def settings(**options: Any) -> list[dict[str, Any]]:
    return [
        {"cost": cost, "memory": memory, "solve_every": 3, **options} for cost in COSTS for memory in (0, 0.9, "auto")
    ]


@pytest.mark.parametrize("uneven", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("count", [2, 4])
def test_numbers_of_one_process(count: int, uneven: bool) -> None:
    sizes = (UNEVEN if uneven else EVEN)[count]
    found = run_processes(count, train_all, settings(), sizes)
    for number, options in enumerate(settings()):
        expected = train(options, sizes, distributed=False)
        for results in found:
            for what in ("terms", "gradients", "weights"):
                assert_close(results[number][what], expected[what])


def run_calls(options: dict[str, Any], shards: Sequence[Any], process: int | None) -> dict[str, Any]:
    """Terms and gradients of prepared calls, each ``(samples of each process, views)``; None: one process has all."""
    student = net(4, seed=1)
    transfer = RepresentationTransfer(net(6, seed=2), LAYERS, **options)
    terms, gradients, values = [], [], []
    with transfer.attached(student), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call, (sizes, views, poison) in enumerate(shards):
            for view in range(views):
                x, _ = batch(10 * call + view, sizes)
                if poison is not None:
                    x[sum(sizes[:poison])] = float("nan")
                student(x if process is None else x.split(list(sizes))[process])
            term = transfer.loss()
            terms.append(term.detach())
            values.append(torch.stack([distance.value for distance in transfer.distances]))
            gradient = torch.autograd.grad(term, list(student.parameters()), allow_unused=True)
            gradients.append([torch.zeros(()) if part is None else part for part in gradient])
        bad = transfer.check_finite()
    return {"terms": torch.stack(terms), "values": values, "gradients": gradients, "bad": bad}


def run_calls_on_ranks(options: dict[str, Any], shards: Sequence[Any]) -> dict[str, Any]:
    result = run_calls(options, shards, dist.get_rank())
    for parts in result["gradients"]:
        for part in parts:
            dist.all_reduce(part.div_(dist.get_world_size()))
    return result


def run_all_calls(options: Sequence[dict[str, Any]], shards: Sequence[Any]) -> list[dict[str, Any]]:
    return [run_calls_on_ranks(each, shards) for each in options]


def check_calls(shards: Sequence[Any], options: Sequence[dict[str, Any]]) -> None:
    found = run_processes(2, run_all_calls, options, shards)
    for number, each in enumerate(options):
        expected = run_calls(each, shards, None)
        for results in found:
            torch.testing.assert_close(results[number], expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def test_views_skipped_pairs_and_values_that_are_not_finite() -> None:
    # (samples of each process, forwards, process with a NaN); 2 samples are too few for the correlation of layer "3".
    shards = [
        ((4, 2), 1, None),
        ((3, 3), 2, None),
        ((3, 2), 1, 1),  # a call that solves
        ((1, 1), 1, None),
        ((1, 3), 2, None),
        ((5, 1), 1, 0),  # a call that does not
        ((4, 4), 1, None),
        ((1, 1), 2, None),
        ((2, 6), 1, None),
    ]
    plans = [{"cost": cost, "memory": memory, "solve_every": 4} for cost in COSTS for memory in (0, 0.9)]
    controls = [{"cost": "correlation", "plan": plan} for plan in ("uniform", "random", "exact")]
    check_calls(shards, [*plans, *controls])


def test_static_plan_counts_the_samples_of_all() -> None:
    shards = [((60, 10), 1, None)] * 6
    check_calls(shards, [{"cost": "sqeuclidean", "plan": "static"}])


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


def quarrel() -> tuple[str, Any]:
    """Rank 1 solves another plan than rank 0."""
    import lightning_otrt.steps.coupling as engine

    solve = engine.sinkhorn_plan

    def other(cost: Tensor, *args: Any, **kwargs: Any) -> Any:
        plan = solve(cost, *args, **kwargs)
        return plan._replace(matrix=plan.matrix.roll(dist.get_rank(), 1)) if hasattr(plan, "_replace") else plan

    engine.sinkhorn_plan = other
    student = net(4, seed=1)
    transfer = RepresentationTransfer(net(6, seed=2), LAYERS)
    with transfer.attached(student), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in range(3):
            student(batch(call, (8,))[0])
            transfer.loss()
    return str(caught[0].message), [pair.plan.matrix for pair in transfer.engine.pairs]


def test_plans_come_from_the_first_where_they_differ() -> None:
    (said, plans), (_, others) = run_processes(2, quarrel)
    assert "differ in some bits" in said
    assert all(torch.equal(a, b) for a, b in zip(plans, others, strict=True))


def without_a_forward() -> list[float]:
    student = net(4, seed=1)
    transfer = RepresentationTransfer(net(6, seed=2), LAYERS, strict=False)
    terms = []
    with transfer.attached(student), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in range(3):
            if call != 1 or dist.get_rank() == 0:
                student(batch(call, (8,))[0])
            terms.append(float(transfer.loss()))
    return terms


def test_strict_false_leaves_the_term_out_on_all() -> None:
    terms, others = run_processes(2, without_a_forward)
    assert terms == others
    assert terms[1] == 0
    assert terms[0] > 0
    assert terms[2] > 0


def own_group() -> Tensor:
    """Two groups of two processes, each with a batch of its own."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    student = net(4, seed=1)
    transfer = RepresentationTransfer(net(6, seed=2), LAYERS, process_group=groups[rank // 2])
    with transfer.attached(student):
        student(batch(rank // 2, (4, 4))[0].split(4)[rank % 2])
        return transfer.loss().detach()


def test_process_group() -> None:
    found = run_processes(4, own_group)
    for number in range(2):
        expected = run_calls({}, [((4, 4), 1, None)], None)["terms"][0] if number == 0 else found[2]
        assert_close(found[2 * number], expected)
        assert_close(found[2 * number + 1], expected)
    assert not torch.equal(found[0], found[2])


def terms_of(transfer: RepresentationTransfer, student: nn.Module, calls: range, part: slice) -> list[Tensor]:
    terms = []
    for call in calls:
        student(batch(call, (8,))[0][part])
        terms.append(transfer.loss().detach())
    return terms


def tensors_of(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


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
