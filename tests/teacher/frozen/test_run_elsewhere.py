"""A teacher that other code runs, or trains, in the same loop: there it runs in the mode that this code gives it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import seeded
from old_versions import needs_one_graph
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

X = seeded(0, torch.randn, 8, 4)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU()), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def run_too(teacher: nn.Module, student: nn.Module, grad: bool, mode: bool | None) -> Tensor:
    """Two steps with the term, in each of which other code runs the teacher, too."""
    transfer = RepresentationTransfer(teacher, ["body"])
    with transfer.attached(student):
        for _ in range(2):
            (student._orig_mod if hasattr(student, "_orig_mod") else student).train()
            student(X)
            transfer.loss()
            if mode is not None:
                teacher.train(mode)
            with torch.set_grad_enabled(grad):
                found = teacher(X)
    return found


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("mode", [None, True, False])
@pytest.mark.parametrize("came", [True, False])
def test_other_code_decides_the_mode(came: bool, mode: bool | None, grad: bool) -> None:
    """The target network of BYOL has batch normalisation in training mode, and learns its statistics."""
    teacher, alone = (seeded(1, Net, 8).train(came) for _ in range(2))
    found = run_too(teacher, Net(6), grad, mode)
    for _ in range(2):
        if mode is not None:
            alone.train(mode)
        expected = alone(X)
    assert torch.equal(found, expected)
    assert found.requires_grad is grad
    for name, value in alone.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], value), name
    assert [part.training for part in teacher.modules()] == [part.training for part in alone.modules()]


@pytest.mark.parametrize("fullgraph", [pytest.param(True, marks=needs_one_graph), False])
def test_compiled(fullgraph: bool) -> None:
    """The term is that of a teacher in evaluation mode, and its statistics are those of the other code alone."""
    teacher, student = seeded(1, Net, 8), seeded(2, Net, 6)
    plain = copy.deepcopy(teacher).eval(), copy.deepcopy(student)
    compiled = torch.compile(student, backend="eager", fullgraph=fullgraph)
    values = []
    for own, forward, network in ((student, compiled, teacher), (plain[1], plain[1], plain[0])):
        transfer = RepresentationTransfer(network, ["body"])
        with transfer.attached(own):
            for _ in range(3):
                forward(X)
                values.append(float(transfer.loss().detach()))
    assert values[:3] == pytest.approx(values[3:], rel=1e-5)
    assert int(teacher.body[1].num_batches_tracked) == 0
    assert all(part.training for part in teacher.modules())


def test_two_networks_that_teach_each_other() -> None:
    """Each is a student in training mode, and the other one's teacher in evaluation mode."""
    first, second = Net(6), Net(8)
    transfers = RepresentationTransfer(second, ["body"]), RepresentationTransfer(first, ["body"])
    with transfers[0].attached(first), transfers[1].attached(second):
        for _ in range(3):
            first(X), second(X)
            sum(transfer.loss() for transfer in transfers).backward()
    assert [int(network.body[1].num_batches_tracked) for network in (first, second)] == [3, 3]


def test_copies_of_the_teacher_lose_the_hook() -> None:
    teacher = Net(8)
    transfer = RepresentationTransfer(teacher, ["body"])
    with transfer.attached(student := Net(6)):
        student(X)
        transfer.loss()
        copies = copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))
    for other in copies:
        other(X)
        assert not other._forward_pre_hooks


def test_two_networks_that_teach_each_other_under_autocast() -> None:
    """The weights that the teacher's run has cast, without gradient, are not those of its own training forward."""
    first, second = Net(6), Net(8)
    transfers = RepresentationTransfer(second, ["body"]), RepresentationTransfer(first, ["body"])
    with transfers[0].attached(first), transfers[1].attached(second):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                found = first(X), second(X)
            first.zero_grad(), second.zero_grad()
            (sum(transfer.loss() for transfer in transfers) + sum(each.sum() for each in found)).backward()
    for network in (first, second):
        assert all(bool(parameter.grad.any()) for parameter in (network.body[0].weight, network.head.weight))
