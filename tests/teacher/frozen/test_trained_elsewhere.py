"""A teacher that other code trains in the same loop is told of, once, unless that code calls ``train()`` itself."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

X = seeded(0, torch.randn, 8, 4)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU()), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _mutual_steps(teacher: nn.Module, *, calls_train: bool = False, no_grad: bool = False) -> list[str]:
    transfer, student = RepresentationTransfer(teacher, ["body"]), Net(6)
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        for _ in range(2):
            student(X)
            transfer.loss()
            if calls_train:
                teacher.train()
            with torch.set_grad_enabled(not no_grad):
                teacher(X)
    return [str(warning.message) for warning in caught if "Other code runs the teacher" in str(warning.message)]


def test_a_teacher_that_is_trained_too() -> None:
    teacher = Net(8)
    [message] = _mutual_steps(teacher)
    assert message.startswith("Other code runs the teacher (Net) with gradient while it is attached.")
    assert teacher.training
    assert not teacher._forward_pre_hooks


def test_two_networks_that_teach_each_other() -> None:
    first, second = Net(6), Net(8)
    transfers = RepresentationTransfer(second, ["body"]), RepresentationTransfer(first, ["body"])
    with transfers[0].attached(first), transfers[1].attached(second):
        first(X)
        with pytest.warns(UserWarning, match="Other code runs the teacher"):
            second(X)
        sum(transfer.loss() for transfer in transfers)


@pytest.mark.parametrize("how", [{"calls_train": True}, {"no_grad": True}], ids=str)
def test_nothing_is_told(how: dict[str, bool]) -> None:
    teacher = Net(8)
    assert _mutual_steps(teacher, **how) == []
    assert int(teacher.body[1].num_batches_tracked) == (2 if "calls_train" in how else 0)


def test_a_teacher_in_evaluation_mode_or_frozen() -> None:
    assert _mutual_steps(Net(8).eval()) == []
    assert _mutual_steps(Net(8).requires_grad_(False)) == []


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
