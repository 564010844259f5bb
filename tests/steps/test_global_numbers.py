"""The term of a batch that lies on several processes has the numbers of one process with all of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_problem import LAYERS, TOLERANCE, assert_close, batch, net
from engines import TERMS
from processes import run_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_otrt import LogitDistillation, RepresentationTransfer

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
    transfer = RepresentationTransfer(net(6, seed=2), LAYERS, **{"weight": 2.0, **options})
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
        {**term, "memory": memory, "solve_every": 3, **options}
        for term in TERMS.values()
        for memory in (0, 0.9, "auto")
    ]


def distilled() -> list[dict[str, Any]]:
    """With soft targets and with a regression, beside the transport term and alone."""
    ways = [LogitDistillation(2.0, temperature=2.0), LogitDistillation(2.0, features="4:input")]
    return [{"distillation": way, "memory": 0.9, "weight": weight} for way in ways for weight in (2.0, 0)]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_distillation_has_the_numbers_of_one_process(count: int) -> None:
    sizes = UNEVEN[count]
    found = run_processes(count, train_all, distilled(), sizes)
    for number, options in enumerate(distilled()):
        expected = train(options, sizes, distributed=False)
        for results in found:
            for what in ("terms", "gradients", "weights"):
                assert_close(results[number][what], expected[what])
            own, other = (each["state"]["distillation"] for each in (results[number], expected))
            assert own["calls"] == other["calls"] == ACCUMULATE * STEPS
            assert_close([own["sums"], own["map"]], [other["sums"], other["map"]])
        assert float(expected["terms"].min()) > 1e-3


@pytest.mark.parametrize("uneven", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
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
            values.append(torch.stack([term.detach(), *(distance.value for distance in transfer.distances)]))
            parameters = list(student.parameters())
            gradient: Any = [None] * len(parameters)
            if term.requires_grad:
                gradient = torch.autograd.grad(term, parameters, allow_unused=True)
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
    plans = [{**term, "memory": memory, "solve_every": 4} for term in TERMS.values() for memory in (0, 0.9)]
    controls = [{"cost": "correlation", "plan": plan} for plan in ("uniform", "random", "exact")]
    check_calls(shards, [*plans, *controls])


def test_a_regression_of_too_few_observations_is_skipped_on_all() -> None:
    shards = [
        ((1, 1), 1, None),
        ((1, 2), 1, None),
        ((1, 1), 2, None),
        ((3, 2), 2, None),
        ((2, 0), 1, None),
        ((4, 1), 1, 1),
        ((1, 1), 1, None),
        ((2, 2), 1, None),
    ]
    option = LogitDistillation(features="4:input")
    check_calls(shards, [{"distillation": option, "weight": weight, "strict": False} for weight in (0, 2.0)])


def test_static_plan_counts_the_samples_of_all() -> None:
    shards = [((60, 10), 1, None)] * 6
    check_calls(shards, [{"cost": "sqeuclidean", "plan": "static"}])


@pytest.mark.slow
def test_a_far_smaller_batch_of_all_solves_no_plan() -> None:
    # One process alone may have few samples, or as many as before while all together have too few.
    shards = [((8, 8), 1, None), ((4, 3), 1, None), ((1, 11), 1, None), ((3, 1), 1, None), ((6, 1), 2, None)]
    options = [{**term, "memory": memory, "solve_every": 1} for term in TERMS.values() for memory in (0, 0.9, "auto")]
    # Not twice in a row, however small the second one is.
    check_calls([*shards, ((8, 8), 1, None), ((3, 4), 1, None), ((1, 2), 1, None), ((2, 5), 1, None)], options)


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
