"""A module that takes the place of a recorded one in the middle of a run is recorded, with a word."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ValidatedTask, loader, make_task, make_teacher, make_trainer, seeded
from torch import Tensor, nn

from lightning_otrt import OTRTCallback, RepresentationTransfer, transport_distance

X = seeded(0, torch.randn, 16, 3, 8, 8)


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.GELU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU())
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean((2, 3)))


def _expected(student: Any, teacher: Any, layers: list[str]) -> float:
    """The mean distance of the layers by hand."""
    values = []
    for layer in layers:
        sides = []
        for net in (student, teacher):
            x = net.second(net.first(X)) if layer != "first" else net.first(X)
            x = x.mean((2, 3)).T if layer == "head:input" else nn.functional.adaptive_avg_pool2d(x, 4).movedim(1, 0)
            sides.append(x.flatten(1).detach())
        values.append(float(transport_distance(*sides, plan="identity").value))
    return sum(values) / len(values)


def _new(width: int = 6) -> nn.Sequential:
    return seeded(9, lambda: nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU()))


def _replace(name: str, new: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    return lambda net: setattr(net, name, new())


#: The layers, what is done after two steps, and those that had no term in the step after it.
REPLACED: dict[str, tuple[list[str], Callable[[nn.Module], None], list[str]]] = {
    "one of two": (["first", "second"], _replace("second", _new), ["second"]),
    "the only one": (["second"], _replace("second", _new), ["second"]),
    "a copy of it": (["second"], lambda net: setattr(net, "second", copy.deepcopy(net.second)), ["second"]),
    "the head, of other classes": (["head:input"], _replace("head", lambda: nn.Linear(6, 9)), ["head:input"]),
    "the module around it": (["second.1"], _replace("second", _new), ["second.1"]),
    "a wrapper around it": (
        ["second"],
        lambda net: setattr(net, "second", nn.Sequential(net.second, nn.Conv2d(6, 6, 1))),
        ["second"],
    ),
    "a module inside": (["second"], lambda net: net.second.__setitem__(0, _new()[0]), []),
    "a module behind": (["second"], _replace("head", lambda: nn.Linear(6, 9)), []),
}


@pytest.mark.parametrize("layers", [["second"], ["first"]], ids=["recorded", "not recorded"])
def test_a_new_part_of_the_teacher_runs_frozen(layers: list[str]) -> None:
    """Its batch normalisation learns nothing, and it drops nothing."""
    student, teacher = seeded(1, Net), seeded(2, Net)
    new = nn.Sequential(nn.BatchNorm2d(6), nn.Dropout(0.5), _new())
    with warnings.catch_warnings(), (transfer := RepresentationTransfer(teacher, layers)).attached(student):
        warnings.simplefilter("ignore")
        for step in range(4):
            if step == 2:
                teacher.second = new
            student(X)
            transfer.loss()
    assert int(new[0].num_batches_tracked) == 0
    assert all(part.training for part in new.modules())


@pytest.mark.parametrize("of_teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("name", REPLACED)
def test_the_new_module_is_recorded(name: str, of_teacher: bool) -> None:
    layers, replace, names = REPLACED[name]
    student, teacher = seeded(1, Net), seeded(2, Net)
    transfer = RepresentationTransfer(teacher, layers, weight=1.0, plan="identity")
    with transfer.attached(student), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            if step == 2:
                replace(teacher if of_teacher else student)
            student(X)
            value = float(transfer.loss().detach())
    side = "teacher" if of_teacher else "student"
    told = [str(warning.message) for warning in caught if "took the place" in str(warning.message)]
    assert [re.search(rf"of the {side} layers (\[.*?\])", text).group(1) for text in told] == [str(names)] * bool(names)
    assert value == pytest.approx(_expected(student, teacher, [layer.removesuffix(".1") for layer in layers]), rel=1e-4)


def test_the_new_module_is_trained() -> None:
    student = seeded(1, Net)
    transfer = RepresentationTransfer(seeded(2, Net), ["second"], weight=1.0)
    with transfer.attached(student), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(3):
            if step == 1:
                student.second = _new()
            student(X)
            loss = transfer.loss()
        loss.backward()
    assert student.second[0].weight.grad.abs().sum() > 0


def test_one_that_is_gone_is_an_error() -> None:
    student = seeded(1, Net)
    transfer = RepresentationTransfer(seeded(2, Net), ["second.1"], weight=1.0)
    with transfer.attached(student):
        student(X)
        transfer.loss()
        student.second = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1))
        student(X)
        with pytest.raises(ValueError, match=r"student layer 'second.1' is no longer in the student \(Net\)"):
            transfer.loss()


def test_one_of_another_width_is_an_error() -> None:
    student = seeded(1, Net)
    transfer = RepresentationTransfer(seeded(2, Net), ["second"], weight=1.0)
    with transfer.attached(student):
        student(X)
        transfer.loss()
        student.second, student.head = nn.Conv2d(6, 8, 1), nn.Linear(8, 4)
        student(X)
        with pytest.warns(UserWarning, match="took the place"):
            transfer.loss()
        student(X)
        with pytest.raises(ValueError, match="second"):
            transfer.loss()


def test_under_a_trainer() -> None:
    class Grows(ValidatedTask):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.net.block1 = copy.deepcopy(self.net.block1)

    task = make_task(Grows)
    callback = OTRTCallback(make_teacher(), {"net.block1": "block1"}, weight=1.0)
    with pytest.warns(UserWarning, match=r"student layers \['net.block1'\]"):
        make_trainer(max_epochs=3, max_steps=-1, callbacks=[callback]).fit(task, loader(), loader(16))
    assert float(callback.transfer.distances[0].value) > 0
