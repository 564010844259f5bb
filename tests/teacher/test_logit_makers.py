"""Logits that evaluation makes otherwise than training are told of: the teacher's are those of evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_otrt import LogitDistillation, RepresentationTransfer

X = seeded(0, torch.randn, 16, 8)


class Net(nn.Module):
    """Two heads, a dropout behind one of them, and what is returned in each mode."""

    def __init__(self, width: int, training: Callable[..., object], evaluation: Callable[..., object]) -> None:
        super().__init__()
        self.body, self.drop = nn.Sequential(nn.Linear(8, width), nn.ReLU()), nn.Dropout()
        self.first, self.last = nn.Linear(width, 5), nn.Linear(width, 5)
        self.modes = evaluation, training

    def forward(self, x: Tensor) -> object:
        x = self.body(x)
        first, last = self.first(x), self.last(x)
        return self.modes[self.training](first, last, self.drop(last))


def _last(first: Tensor, last: Tensor, dropped: Tensor) -> Tensor:
    return last


DIFFERENT = {
    "exits": lambda first, last, dropped: [first, last],
    "exits as a tuple": lambda first, last, dropped: (first, last),
    "another head": lambda first, last, dropped: first,
}
ONLY_EVALUATED = {
    "sigmoid": lambda first, last, dropped: last.sigmoid(),
    "scaled": lambda first, last, dropped: last / 10,
    "mean of heads": lambda first, last, dropped: (first + last) / 2,
}
ALIKE = {
    "the same": (_last, _last),
    "a dropout": (lambda first, last, dropped: dropped, lambda first, last, dropped: dropped),
    "computed in both": (lambda first, last, dropped: first + last, lambda first, last, dropped: (first + last) / 2),
    "a functional dropout": (lambda first, last, dropped: nn.functional.dropout(last), _last),
    "noise in training": (lambda first, last, dropped: last + torch.randn_like(last), _last),
    "with others in training": (lambda first, last, dropped: (last, first), _last),
}


def _told(training: Callable[..., object], evaluation: Callable[..., object]) -> list[str]:
    student, teacher = seeded(1, Net, 8, training, evaluation), seeded(2, Net, 12, training, evaluation)
    distillation = LogitDistillation(activation="softmax")
    transfer = RepresentationTransfer(teacher, ["body"], weight=0.0, distillation=distillation)
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        for _ in range(2):
            student(X)
            transfer.loss()
        assert not [hook for module in student.modules() for hook in module._forward_hooks.values() if _is_ours(hook)]
    return [str(warning.message) for warning in caught if "The student's logits are" in str(warning.message)]


def _is_ours(hook: object) -> bool:
    return getattr(hook, "__qualname__", "").startswith("LogitMakers")


class HeadTwice(Net):
    """The last head runs once more on other features, after its output that is returned."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        logits = self.last(features)
        self.last(-features)
        return logits


class DropInTraining(Net):
    """A dropout behind the head that evaluation does not call."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.last(self.body(x))
        return self.drop(logits) if self.training else logits


@pytest.mark.parametrize("kind", [HeadTwice, DropInTraining])
def test_the_same_head_in_other_code(kind: type[Net]) -> None:
    student, teacher = seeded(1, kind, 8, _last, _last), seeded(2, kind, 12, _last, _last)
    transfer = RepresentationTransfer(
        teacher, ["body"], weight=0.0, distillation=LogitDistillation(activation="softmax")
    )
    with transfer.attached(student):
        student(X)
        transfer.loss()


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_head_in_evaluation(name: str) -> None:
    [message] = _told(DIFFERENT[name], _last)
    assert "what 'first' returns in training, and what 'last' returns in evaluation mode" in message.replace(
        "drop", "last"
    )


@pytest.mark.parametrize("name", ONLY_EVALUATED)
def test_something_computed_in_evaluation(name: str) -> None:
    [message] = _told(_last, ONLY_EVALUATED[name])
    assert "returns in training, and computed from what modules return in evaluation mode" in message


@pytest.mark.parametrize("name", ALIKE)
def test_no_alarm(name: str) -> None:
    assert _told(*ALIKE[name]) == []


def test_a_forward_that_fails_leaves_no_hook() -> None:
    def fails(*args: object) -> object:
        raise ZeroDivisionError

    student, teacher = seeded(1, Net, 8, fails, _last), seeded(2, Net, 12, fails, _last)
    transfer = RepresentationTransfer(teacher, ["body"], weight=0.0, distillation=1.0)
    with pytest.raises(ZeroDivisionError), transfer.attached(student):
        student(X)
    assert not any(module._forward_hooks for module in student.modules())


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_real_networks(name: str) -> None:
    timm = pytest.importorskip("timm")
    options = {"img_size": 32} if name.startswith("vit") else {}
    student, teacher = (timm.create_model(name, num_classes=5, drop_rate=0.1, **options) for _ in "ab")
    transfer = RepresentationTransfer(teacher, weight=0.0, distillation=1.0)
    with warnings.catch_warnings(), transfer.attached(student.train()):
        warnings.simplefilter("error")
        student(seeded(3, torch.randn, 4, 3, 32, 32))
        transfer.loss()
