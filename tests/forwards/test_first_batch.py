"""The first batch, on which both networks are traced, gives the term of the batch itself."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from processes import run_processes
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer, transport_distance


class Normalising(nn.Module):
    """Standardises its inputs, in place or not, and then has a hidden layer.

    Args:
        width: Hidden neurons.
        in_place: Whether it writes to its inputs.
    """

    def __init__(self, width: int, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        # Correlations of a linear layer alone would not see that its inputs were normalised twice.
        self.hidden = nn.Sequential(nn.Linear(6, width), nn.Tanh())
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(2).div_(3) if self.in_place else (x - 2) / 3
        return self.head(self.hidden(x))


@pytest.mark.parametrize(("student_writes", "teacher_writes"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("cost", ["correlation", "euclidean"])
def test_networks_that_write_to_their_inputs(student_writes: bool, teacher_writes: bool, cost: str) -> None:
    """Each network normalises what the batch holds, once, in the first step and in later ones."""
    torch.manual_seed(0)
    student, teacher = Normalising(5, in_place=student_writes), Normalising(7, in_place=teacher_writes)
    x = 3 * torch.randn(40, 6) + 2
    found: list[Tensor] = []
    transfer = RepresentationTransfer(teacher, ["hidden"], plan="exact", cost=cost, memory=0)
    with transfer.attached(student):
        for _ in range(3):
            with pytest.warns(UserWarning, match="in place") if not found else torch.enable_grad():
                student(x.clone())
            found.append(transfer.loss().detach() / transfer.weight)
    y, z = (net.hidden((x - 2) / 3).detach().T for net in (student, teacher))
    expected = transport_distance(y, z, plan="exact", cost=cost).value
    torch.testing.assert_close(torch.stack(found), expected.expand(3), rtol=1e-4, atol=1e-5)


OPTIONS: dict[str, Any] = {"plan": "exact", "distillation": 1.0, "memory": 0}


class OutOfMemory(nn.Module):
    """A network that fails in training where a batch is too large.

    Args:
        width: Hidden neurons.
        after: How many of its layers run before that.
        most: The largest batch.
    """

    def __init__(self, width: int, after: int = 0, most: int = 10) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 3)])
        self.after, self.most = after, most

    def forward(self, x: Tensor) -> Tensor:
        size = len(x)
        for index, layer in enumerate(self.layers):
            if self.training and index == self.after and size > self.most:
                raise torch.OutOfMemoryError("out of memory")
            x = layer(x).tanh()
        if self.training and self.after == len(self.layers) and size > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return x


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("cache", [None, "memory"])
def test_a_first_batch_that_is_too_large(after: int, cache: str | None) -> None:
    """A smaller one is then the first: nothing that was noted of the other one is compared with it."""
    torch.manual_seed(0)
    student, teacher, x = OutOfMemory(5, after), OutOfMemory(7, most=100), torch.randn(20, 6)
    expected = RepresentationTransfer(teacher, **OPTIONS)
    with expected.attached(student):
        student(x[:10])
        value = expected.loss().detach()
    transfer = RepresentationTransfer(teacher, teacher_cache=cache, **OPTIONS)
    with transfer.attached(student):
        with pytest.raises(torch.OutOfMemoryError):
            student(x)
        student(x[:10])
        torch.testing.assert_close(transfer.loss().detach(), value)
        assert transfer.pairs == expected.pairs
        student(x[:10])
        torch.testing.assert_close(transfer.loss().detach(), value)
    assert transfer.cache is None or transfer.cache.hits == 20  # those of the larger batch were kept


@pytest.mark.parametrize("cache", [None, "memory"])
def test_a_teacher_that_fails_in_the_first_step(cache: str | None) -> None:
    """From any of its forwards on, those that choose the layers among them: the next batch is then the first."""
    calls, fails_from = itertools.count(1), 0

    class Fails(OutOfMemory):
        def forward(self, x: Tensor) -> Tensor:
            if fails_from and next(calls) >= fails_from:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x)

    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for first in itertools.count():
        torch.manual_seed(1)
        student, calls, fails_from = OutOfMemory(5), itertools.count(1), first
        transfer = RepresentationTransfer(Fails(7), teacher_cache=cache, **OPTIONS)
        with transfer.attached(student):
            try:
                student(x)
                has_failed = False
            except torch.OutOfMemoryError:
                has_failed, fails_from = True, 0
                student(x)
            fails_from = 0
            found.append(transfer.loss().detach())
            student(x)
            found.append(transfer.loss().detach())
        assert transfer.cache is None or transfer.cache.hits >= 10
        if first and not has_failed:
            break
    assert len(found) > 6
    torch.testing.assert_close(torch.stack(found), found[0].expand(len(found)))


def _retry_on_one_process() -> tuple[list[float], int]:
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    student, teacher = OutOfMemory(5, after=1 if rank else 5), OutOfMemory(7, most=100)
    transfer = RepresentationTransfer(teacher, plan="exact", memory=0)
    x, values = torch.randn(20, 6, generator=torch.Generator().manual_seed(rank)), []
    with transfer.attached(student):
        for _ in range(2):
            try:
                student(x)
            except torch.OutOfMemoryError:
                student(x[:10])
            values.append(float(transfer.loss().detach()))
    return values, len(transfer.pairs)


def test_one_process_alone_that_tries_a_smaller_batch() -> None:
    """It chooses nothing anew: the others, which have not failed, would not choose with it."""
    found = run_processes(2, _retry_on_one_process)
    assert found[0] == found[1]
    assert all(value > 0 for value in found[0][0])


def test_a_copy_in_the_first_step() -> None:
    """Weight averaging may copy a transfer between the forward and the loss."""
    student, teacher = OutOfMemory(5, after=5), OutOfMemory(7)
    transfer = RepresentationTransfer(teacher, plan="exact", memory=0)
    with transfer.attached(student):
        student(torch.randn(10, 6))
        copied = copy.deepcopy(transfer)
        assert transfer.loss() > 0
    assert not copied.is_attached
