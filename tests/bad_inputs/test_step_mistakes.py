"""Wrong teachers, training steps and Trainers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from bad_inputs.fits import TRAINED, Fit, check_mistake, in_all_ways, named
from bad_inputs.networks import OddStrategy, Unhooked, frozen
from helpers import LAYERS, Task, make_task, make_teacher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt import OTRTCallback


class WithoutGradient(Task):
    def loss(self, batch: list[Tensor]) -> Tensor:
        with torch.no_grad():
            features = self.net(batch[0])
        return F.cross_entropy(features + self.net.head.bias, batch[1])


class BareBackward(Task):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


class NoLoss(Task):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return {"loos": self.loss(batch)}


class Replacing(pl.Callback):
    """Puts another training step in the place of ours when the fit has begun."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        own = type(pl_module).training_step.__get__(pl_module)

        def training_step(batch: list[Tensor], batch_idx: int) -> Any:
            return own(batch, batch_idx)

        pl_module.training_step = training_step

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        del pl_module.training_step


def own_net(task: Task) -> nn.Module:
    return task.net


def sharing(task: Task) -> nn.Module:
    teacher = make_teacher(4)
    teacher.block1 = task.net.block1
    return teacher


MISTAKES = [
    # The teacher
    Fit("teacher the student", ValueError, ("the student itself", "copy.deepcopy(student)"), teacher=lambda task: task),
    Fit("teacher in the student", ValueError, ("submodule 'net' of the student", "deepcopy"), teacher=own_net),
    Fit(
        "teacher sharing parameters",
        ValueError,
        ("shares 'block1.0.weight' with the student, where it is 'net.block1.0.weight'", "copy.deepcopy(teacher)"),
        teacher=sharing,
    ),
    Fit(
        "teacher on meta",
        ValueError,
        ("'block1.0.weight' of the teacher is on the meta device", "materialise"),
        teacher=lambda task: make_teacher().to("meta"),
    ),
    # The step and the Trainer
    Fit(
        "student not called",
        RuntimeError,
        ("No forward of a module that holds the layers of the student (Unhooked)", "not `.forward`", "`student_root`"),
        task=lambda: make_task(Unhooked),
    ),
    Fit(
        "root not called",
        RuntimeError,
        ("No forward of the root 'net' of the student (Unhooked)", "not `.forward`", "layers={'net.block1'"),
        task=lambda: make_task(Unhooked),
        options={"student_root": "net"},
    ),
    Fit(
        "student called without gradient",
        RuntimeError,
        ("the student (WithoutGradient)", "with gradient"),
        task=lambda: make_task(WithoutGradient),
    ),
    Fit(
        "recorded layers frozen",
        RuntimeError,
        ("term is constant", "['net.block1'] and all 4 parameters", "are frozen", "unfreeze", "'net.head'"),
        layers=named("net.block1"),
        task=frozen("net.block1"),
    ),
    Fit(
        "student frozen",
        RuntimeError,
        ("No parameter of the student (Task) requires a gradient", "Unfreeze"),
        task=frozen("net"),
    ),
    Fit(
        "manual optimization with a bare backward",
        MisconfigurationException,
        ("BareBackward uses manual optimization", "`self.manual_backward(loss)`", "instead of `loss.backward()`"),
        task=lambda: make_task(BareBackward),
        ways=TRAINED,
    ),
    Fit(
        "dictionary without loss",
        MisconfigurationException,
        ("'loss' key needs to be present",),
        task=lambda: make_task(NoLoss),
        ways=TRAINED,
    ),
    Fit(
        "training step replaced in the fit",
        MisconfigurationException,
        ("`training_step` of Task was replaced after the fit began", "Replace it before `trainer.fit`"),
        others=lambda: [Replacing()],
        ways=TRAINED,
    ),
    Fit(
        "strategy never run",
        MisconfigurationException,
        ("OddStrategy was never tested with representation transfer", 'strategy="ddp"', "strict=False to try"),
        trainer=lambda: {"strategy": OddStrategy()},
        ways=TRAINED,
    ),
    Fit(
        "the same callback twice",
        RuntimeError,
        ("more than one stateful callback of type `OTRTCallback`", "`callback.state_key` must be unique"),
        others=lambda: [OTRTCallback(make_teacher(), dict(LAYERS))],
        ways=("callback",),
    ),
]


@pytest.mark.parametrize(("case", "way"), in_all_ways(MISTAKES))
def test_teachers_steps_and_trainers(case: Fit, way: str) -> None:
    check_mistake(case, way)
