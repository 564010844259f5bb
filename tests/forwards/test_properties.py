"""Properties that the default term has for every architecture, whatever way its forward is written."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from forwards.architectures import ARCHITECTURES, BATCH, Architecture
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

NAMES = [pytest.param(name, marks=pytest.mark.slow if entry.slow else ()) for name, entry in ARCHITECTURES.items()]


def make(teacher: nn.Module, **options: Any) -> RepresentationTransfer:
    """Its plan is fixed: a solved one takes long in float64, and depends on the same readings."""
    return RepresentationTransfer(teacher, weight=1.0, plan="random", **options)


class Subject:
    """A student and a teacher of one architecture with other weights, in float64, in evaluation mode."""

    def __init__(self, name: str) -> None:
        self.entry: Architecture = ARCHITECTURES[name]
        torch.manual_seed(0)
        # In evaluation mode batch statistics and dropout do not tie samples together or draw numbers.
        self.student = self.entry.build().double().eval()
        self.teacher = self.entry.build().double().eval()
        self.called: nn.Module = self.student.get_submodule(self.entry.root)
        self.reports: list[str] = []

    def batch(self) -> dict[str, Any]:
        return self.entry.inputs(torch.Generator().manual_seed(1))

    def term(self, batch: dict[str, Any], *, by_position: bool = False) -> float:
        teacher = self.teacher.get_submodule(self.entry.root)
        transfer = make(teacher, student_root=self.entry.root or None)
        self.reports = []
        transfer.report = self.reports.append
        with transfer.attached(self.student):
            if by_position:
                args, kwargs = positional(self.called, batch)
                self.called(*args, **kwargs)
            else:
                self.called(**batch)
            return float(transfer.loss().detach())


def positional(module: nn.Module, batch: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """As many leading arguments as the batch has in the order of the signature, the others by name."""
    names = list(inspect.signature(module.forward).parameters)
    args, left = [], dict(batch)
    for name in names:
        if name not in left:
            break
        args.append(left.pop(name))
    return args, left


@pytest.mark.parametrize("name", NAMES)
def test_order_of_samples(name: str) -> None:
    subject = Subject(name)
    batch = subject.batch()
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(2))
    shuffled = {key: value.index_select(subject.entry.batch_axis, order) for key, value in batch.items()}
    assert subject.term(shuffled) == pytest.approx(subject.term(batch), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_keyword_against_position(name: str) -> None:
    subject = Subject(name)
    batch = subject.batch()
    assert subject.term(batch, by_position=True) == pytest.approx(subject.term(batch), rel=1e-9)


@pytest.mark.parametrize("name", [name for name in NAMES if ARCHITECTURES[name.values[0]].padding])
def test_content_of_padding(name: str) -> None:
    subject = Subject(name)
    batch = subject.batch()
    assert subject.entry.padding is not None
    other = subject.entry.padding(batch, torch.Generator().manual_seed(3))
    assert any(not torch.equal(other[key], value) for key, value in batch.items())
    assert subject.term(other) == pytest.approx(subject.term(batch), rel=1e-6)


class LabelFirst(nn.Module):
    """The network behind a forward that takes something else first."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, first: Tensor, **batch: Any) -> Any:
        return self.net(**batch)


FIRST = {
    "labels": lambda: torch.arange(BATCH),
    "camera matrices": lambda: torch.eye(4, dtype=torch.float64).repeat(BATCH, 1, 1),
    "uint8 images": lambda: torch.zeros(BATCH, 3, 40, 40, dtype=torch.uint8),
    "one number": lambda: torch.tensor(0.5, dtype=torch.float64),
}


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_first(name: str) -> None:
    """Another first argument changes neither the layers nor the term."""
    entry = ARCHITECTURES[name]
    subject = Subject(name)
    if entry.root:
        pytest.skip("the root gets images alone")
    batch = subject.batch()

    def chosen(first: Tensor) -> tuple[list[tuple[str, str]], float]:
        transfer = make(LabelFirst(subject.teacher))
        student = LabelFirst(subject.student)
        with transfer.attached(student):
            student(first, **batch)
            value = float(transfer.loss().detach())
        return [(pair.student, pair.teacher) for pair in transfer.pairs], value

    plain = make(subject.teacher)
    with plain.attached(subject.student):
        subject.student(**batch)
        expected = float(plain.loss().detach())
    layers = [(f"net.{pair.student}", f"net.{pair.teacher}") for pair in plain.pairs]
    for first in FIRST.values():
        found, value = chosen(first())
        assert found == layers
        assert value == pytest.approx(expected, rel=1e-9)
