"""However a fit ends, module and teacher are as before, and nothing that was recorded is alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    LAYERS,
    Task,
    ValidatedTask,
    hooks,
    loader,
    make_data,
    make_task,
    make_teacher,
    make_trainer,
)
from torch import Tensor
from torch.utils.data import DataLoader
from trainer.fits import fitted, make_callback, state_of

from lightning_otrt import OTRTCallback, OTRTModule
from lightning_otrt.reading.hooks.views import View


class Failing(ValidatedTask):
    """Raises in one place, after the student ran."""

    place = ""
    error: BaseException = RuntimeError("on purpose")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.place == "training_step" and batch_idx == 2:
            raise self.error
        if self.place == "stop" and batch_idx == 2:
            self.trainer.should_stop = True
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        if self.place == "backward" and self.trainer.global_step == 2:
            raise self.error

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.place == "validation" and not self.trainer.sanity_checking:
            raise self.error
        if self.place == "sanity":
            raise self.error

    def configure_optimizers(self) -> Any:
        if self.place == "optimizers":
            raise self.error
        return super().configure_optimizers()


class FailingSetup(pl.Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        raise self.error


#: Where a fit ends; the callback is to clean up in all of them.
PLACES = [
    "nowhere",
    "stop",
    "training_step",
    "backward",
    "validation",
    "sanity",
    "optimizers",
    "setup",
    "forward",
    "term",
]


ENDS = [
    *((place, RuntimeError("on purpose"), "callback", None) for place in PLACES),
    *((place, KeyboardInterrupt(), "callback", None) for place in ("training_step", "backward", "validation", "term")),
    *((place, RuntimeError("on purpose"), "wrapper", None) for place in ("nowhere", "training_step", "setup", "term")),
    *((place, RuntimeError("on purpose"), "callback", "bfloat16") for place in ("nowhere", "training_step", "term")),
]


@pytest.mark.parametrize(
    ("place", "error", "way", "dtype"),
    ENDS,
    ids=[" ".join(filter(None, (place, type(error).__name__, way, dtype))) for place, error, way, dtype in ENDS],
)
def test_nothing_is_left_behind(place, error, way, dtype):
    teacher = make_teacher()
    teacher.head.requires_grad_(False)
    teacher.block1.eval()
    task = make_task(Failing)
    before, attributes = state_of(teacher), state_of(task)["attributes"]
    task.place, task.error = place, error
    options = {"layers": LAYERS, "weight": 2.0, "teacher_dtype": dtype}
    if place == "term":
        options["cost"] = failing_cost(error)
    if place == "forward":
        task.net.head.register_forward_pre_hook(lambda *_: raise_after(task, error))
    callback = None if way == "wrapper" else OTRTCallback(teacher, **options)
    model = OTRTModule(task, teacher, **options) if way == "wrapper" else task
    callbacks = [callback] if way == "callback" else []
    if place == "setup":
        callbacks.append(FailingSetup(error))
    with watched_views() as views:
        if place in ("nowhere", "stop"):
            fit_with_validation(model, callbacks)
        else:
            with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt), match=r"on purpose|^$|0|1"):
                fit_with_validation(model, callbacks)
    transfer = model.otrt if way == "wrapper" else callback.transfer
    task.place = ""
    task.train()
    task.net.head._forward_pre_hooks.clear()
    expected = {name: list(names) for name, names in attributes.items()}
    found = state_of(task)["attributes"]
    assert set(found[""]) - set(expected[""]) <= {"place", "error"}
    assert {name: found[name] for name in found if name} == {name: expected[name] for name in expected if name}
    assert not hooks(task, teacher)
    assert "training_step" not in task.__dict__
    assert state_of(teacher) == before
    assert not transfer.is_attached
    assert not transfer.has_views
    error.__traceback__ = error.__context__ = None  # its frames hold what was recorded
    gc.collect()
    assert not [view for view in views if view() is not None]
    assert torch._dynamo.eval_frame._stance.stance != "force_eager"
    # The same objects can be fitted afterwards.
    if place != "term":
        make_trainer(callbacks=[callback] if way == "callback" else []).fit(model, loader(), loader(16))
        assert transfer.engine.calls == 4


def fit_with_validation(model: Any, callbacks: list[Any]) -> None:
    make_trainer(callbacks=callbacks, max_epochs=1, val_check_interval=4).fit(model, loader(), loader(16))


def failing_cost(error: BaseException) -> Callable[[Tensor, Tensor], Tensor]:
    calls = []

    def cost(student: Tensor, teacher: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 5:
            raise error
        return torch.cdist(student, teacher)

    return cost


def raise_after(task: Task, error: BaseException) -> None:
    if task.place == "forward" and task.training and task.trainer.global_step == 2:
        raise error


class watched_views:
    """Weak references to all views and readings made inside the block."""

    def __enter__(self) -> list[Any]:
        self.made: list[Any] = []
        made, init = self.made, View.__init__

        def recorded(view: View, *args: Any, **kwargs: Any) -> None:
            init(view, *args, **kwargs)
            made.append(weakref.ref(view))

        self.init, View.__init__ = init, recorded
        return self.made

    def __exit__(self, *error: object) -> None:
        View.__init__ = self.init


class Alive(pl.Callback):
    """After each step: is any reading alive that was recorded in it?"""

    def __init__(self, transfer: Any) -> None:
        self.readings: list[Any] = []
        self.alive: list[int] = []
        self.count = 0
        loss = transfer.loss

        def noting(**options: Any) -> Tensor:
            for view in transfer.views:
                for side in (view.student, view.teacher):
                    self.readings += [weakref.ref(reading) for readings in side.values() for reading in readings]
            return loss(**options)

        transfer.loss = noting

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.count += len(self.readings)
        self.alive.append(sum(reading() is not None for reading in self.readings))
        self.readings = []


def test_readings_die_with_their_step():
    callback = make_callback(memory=0.9)
    alive = Alive(callback.transfer)
    fitted([callback, alive])
    assert alive.count == 4 * 4
    assert alive.alive == [0, 0, 0, 0]


def test_evaluation_alone_touches_nothing():
    callback, task = make_callback(), make_task(ValidatedTask)
    before = state_of(task)
    trainer = make_trainer(callbacks=[callback])
    trainer.validate(task, loader(16), verbose=False)
    trainer.test(task, loader(16), verbose=False)
    trainer.predict(task, DataLoader(make_data(8).tensors[0], batch_size=4))
    assert state_of(task)["bytes"] == before["bytes"]
    assert callback.transfer.engine is None


def test_a_training_step_of_the_instance_is_put_back():
    task = make_task()
    own = task.training_step
    task.training_step = lambda batch, batch_idx: own(batch, batch_idx)
    mine = task.training_step
    fitted([make_callback()], task=task)
    assert task.__dict__["training_step"] is mine
