"""One fit in each of the three ways, with what a mistake must leave behind: nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from bad_inputs.messages import assert_message
from helpers import LAYERS, Task, assert_same, hooks, loader, make_data, make_task, make_teacher, make_trainer, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_otrt import LayerPair, OTRTCallback, OTRTModule, RepresentationTransfer

NAN, INF = float("nan"), float("inf")
Error = type[BaseException]

ALL = ("callback", "wrapper", "plain")
TRAINED = ("callback", "wrapper")

#: The transfers of a test, also of fits that failed.
KEPT: list[RepresentationTransfer] = []


@dataclass(frozen=True)
class Fit:
    """One fit. What is not given is right."""

    name: str
    error: Error = Exception
    words: tuple[str, ...] = ()
    layers: Any = field(default_factory=lambda: dict(LAYERS))
    options: dict[str, Any] = field(default_factory=dict)
    task: Callable[[], Task] = make_task
    teacher: Callable[[Task], nn.Module] = lambda task: make_teacher()
    data: Callable[[], Any] = lambda: loader(16)
    trainer: Callable[[], dict[str, Any]] = dict
    others: Callable[[], list[pl.Callback]] = list
    ways: tuple[str, ...] = ALL

    def run(self, way: str, task: Task, teacher: Any) -> RepresentationTransfer:
        """Train in one of the three ways; everything that is built is built here, as in a user's script."""
        options = {"weight": 2.0, **self.options}
        if way == "plain":
            return self._run_plainly(task, RepresentationTransfer(teacher, self.layers, **options))
        if way == "wrapper":
            module = OTRTModule(task, teacher, self.layers, **options)
            callbacks, transfer = self.others(), module.otrt
        else:
            added = OTRTCallback(teacher, self.layers, **options)
            module, callbacks, transfer = task, [added, *self.others()], added.transfer
        KEPT.append(transfer)
        make_trainer(**{"callbacks": callbacks, "max_epochs": 1, **self.trainer()}).fit(module, self.data())
        return transfer

    def _run_plainly(self, task: Task, transfer: RepresentationTransfer) -> RepresentationTransfer:
        KEPT.append(transfer)
        optimizer = task.configure_optimizers()
        with transfer.attached(task):
            for batch in self.data():
                optimizer.zero_grad()
                (task.loss(batch) + transfer.loss()).backward()
                optimizer.step()
        return transfer


def named(layer: str, teacher: str = "block1", **options: Any) -> Any:
    """One pair of layers."""
    return [LayerPair(layer, teacher, **options)] if options else {layer: teacher}


def batches(*sizes: int) -> DataLoader[Any]:
    """Batches of these sizes."""
    return DataLoader([[part[:size] for part in make_data().tensors] for size in sizes], batch_size=None)


def state_of(*modules: nn.Module) -> list[Any]:
    """All that a failed fit must give back of a teacher."""
    return [
        (
            {name: None if t.is_meta else (t.dtype, t.numpy().tobytes()) for name, t in module.state_dict().items()},
            {name: part.training for name, part in module.named_modules()},
            {name: (parameter.requires_grad, parameter.grad is None) for name, parameter in module.named_parameters()},
        )
        for module in modules
    ]


def assert_nothing_left(task: Task, teacher: nn.Module) -> None:
    assert not hooks(task, teacher)
    assert not {"training_step", "manual_backward"} & set(task.__dict__)
    assert torch.is_grad_enabled()
    for transfer in KEPT:
        assert not transfer.is_attached
        assert not transfer.has_views


@cache
def undisturbed(way: str) -> dict[str, Tensor]:
    """Weights after a fit without any mistake before it."""
    task = make_task()
    Fit("right").run(way, task, make_teacher())
    return weights(task)


def in_all_ways(mistakes: list[Fit]) -> list[Any]:
    """Each mistake in each way in which it can be made."""
    return [pytest.param(case, way, id=f"{case.name}, {way}") for case in mistakes for way in case.ways]


def check_mistake(case: Fit, way: str) -> None:
    """The error says what is wrong, nothing is left behind, and a corrected fit gives the same weights as any other."""
    task = case.task()
    teacher = case.teacher(task)
    before = [] if teacher is task else state_of(teacher)
    start = {name: value.clone() for name, value in task.state_dict().items()}
    with pytest.raises(case.error) as raised:
        case.run(way, task, teacher)
    assert type(raised.value) is case.error
    assert_message(raised.value, case.words)
    assert_nothing_left(task, teacher)
    assert before == ([] if teacher is task else state_of(teacher))

    # Corrected: what was not the mistake is used again.
    blank = Fit("")
    task = task if case.task is make_task else make_task()
    task.load_state_dict(start if case.task is make_task else task.state_dict())
    teacher = teacher if case.teacher is blank.teacher else make_teacher()
    transfer = blank.run(way, task, teacher)
    assert [(pair.student, pair.teacher) for pair in transfer.pairs] == list(LAYERS.items())
    assert_same(weights(task), undisturbed(way))
    assert_nothing_left(task, teacher)
