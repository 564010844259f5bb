"""The term of a batch that lies on several processes: value, gradients and state against one process with all of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_otrt import RepresentationTransfer

COSTS = ("correlation", "euclidean", "sqeuclidean")
EVEN = {2: (6, 6), 4: (3, 3, 3, 3)}
#: One sample carries no correlation of its own; the last has more than all others together.
UNEVEN = {2: (1, 11), 4: (1, 2, 1, 8)}
LAYERS = {"0": "0", "3": "3"}
ACCUMULATE = 2
STEPS = 5
TOLERANCE = 1e-10


def net(width: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36 * width, 2 * width), nn.Linear(2 * width, 3)
        ).double()


def batch(call: int, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(call)
    x = torch.randn(sum(sizes), 1, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (sum(sizes),), generator=generator)


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


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def settings(**options: Any) -> list[dict[str, Any]]:
    return [{"cost": cost, "memory": memory, "solve_every": 3, **options} for cost in COSTS for memory in (0, 0.9, "auto")]


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_numbers_of_one_process(count: int, uneven: bool) -> None:
    sizes = (UNEVEN if uneven else EVEN)[count]
    found = run_processes(count, train_all, settings(), sizes)
    for number, options in enumerate(settings()):
        expected = train(options, sizes, distributed=False)
        for results in found:
            for what in ("terms", "gradients", "weights"):
                assert_close(results[number][what], expected[what])
