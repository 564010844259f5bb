"""Copies of a module that is being trained are plain modules."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    LAYERS,
    Net,
    Task,
    ValidatedTask,
    assert_same,
    differ,
    forwards,
    hooks,
    loader,
    make_task,
    make_teacher,
    make_trainer,
    needs_averaging,
    weights,
)
from lightning.pytorch import callbacks as of_lightning
from torch import nn
from trainer.fits import make_callback

from lightning_otrt import OTRTModule, OTRTMonitor, RepresentationTransfer


class Copying(pl.Callback):
    """Copies the module in the middle of a fit, in every way."""

    def __init__(self) -> None:
        self.copies: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.copies or trainer.global_step < 2:
            return
        self.copies = {
            "deepcopy": copy.deepcopy(pl_module),
            "pickle": pickle.loads(pickle.dumps(pl_module)),
            "submodule": copy.deepcopy(pl_module.net),
            "pickled submodule": pickle.loads(pickle.dumps(pl_module.net)),
            "saved": self.saved(pl_module),
        }

    @staticmethod
    def saved(module: nn.Module) -> nn.Module:
        import io

        file = io.BytesIO()
        torch.save(module, file)
        assert len(file.getvalue()) < 60_000
        file.seek(0)
        return torch.load(file, weights_only=False)


@pytest.mark.filterwarnings("ignore:This Task is a deep copy of one that OTRTModule wrapped")
@pytest.mark.parametrize("way", ["callback", "wrapper"])
def test_copies_in_mid_fit_are_plain(way):
    task, teacher, copying = make_task(), make_teacher(64), Copying()
    if way == "callback":
        model, callbacks = task, [make_callback(teacher), copying]
    else:
        model, callbacks = OTRTModule(task, teacher, layers=LAYERS, weight=2.0), [copying]
    undisturbed = make_task()
    make_trainer(callbacks=[make_callback(make_teacher(64))]).fit(undisturbed, loader())
    with forwards(teacher) as count:
        make_trainer(callbacks=callbacks).fit(model, loader())
        fitted_calls = len(count)
        assert_same(weights(task), weights(undisturbed))
        x, y = next(iter(loader()))
        for name, copied in copying.copies.items():
            assert type(copied) is (Net if "submodule" in name else Task), name
            assert differ({k.removeprefix("net."): v for k, v in weights(copied).items()}, weights(task.net))
            if isinstance(copied, Task):
                assert "teacher" not in repr(vars(copied))
                assert copied._trainer is None, "Lightning's own copies are without the Trainer"
                before = weights(task)
                copied.training_step([x, y], 0).backward()
                assert_same(weights(task), before)
                make_trainer().fit(copied, loader())
            else:
                copied(x).sum().backward()
        assert len(count) == fitted_calls, "a copy ran the teacher"


@needs_averaging
def test_a_moving_average_has_no_teacher_and_no_hook():
    teacher, task = make_teacher(), make_task(ValidatedTask)
    averaging = of_lightning.WeightAveraging(avg_fn=lambda average, value, count: 0.9 * average + 0.1 * value)
    kept: list[Any] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            kept.append(averaging._average_model)

    with forwards(teacher) as count:
        make_trainer(callbacks=[make_callback(teacher), averaging, Keep()], max_epochs=1).fit(
            task, loader(), loader(16)
        )
        calls = len(count)
        average = kept[-1].module
        assert not [name for name, part in average.named_modules() if part is teacher]
        average.net(next(iter(loader()))[0]).sum().backward()
        assert len(count) == calls
    assert sum(p.numel() for p in average.parameters()) == sum(p.numel() for p in task.parameters())

    by_wrapper = make_task(ValidatedTask)
    make_trainer(
        callbacks=[of_lightning.WeightAveraging(avg_fn=lambda average, value, count: 0.9 * average + 0.1 * value)],
        max_epochs=1,
    ).fit(OTRTModule(by_wrapper, make_teacher(), layers=LAYERS, weight=2.0), loader(), loader(16))
    assert_same(weights(by_wrapper), weights(task))
    plain = make_task(ValidatedTask)
    make_trainer(callbacks=[of_lightning.WeightAveraging(avg_fn=lambda a, v, n: 0.9 * a + 0.1 * v)], max_epochs=1).fit(
        plain, loader(), loader(16)
    )
    assert differ(weights(task), weights(plain))


class Lean(Task):
    """A task that says what its copies hold."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "lock": None}


def test_a_wrapped_task_copies_what_it_says():
    wrapped = OTRTModule(make_task(Lean), make_teacher(), layers=LAYERS)
    for copied in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert type(copied) is Lean
        assert copied.lock is None
        assert_same(weights(copied), weights(wrapped))


class KeepsTheBest(pl.Callback):
    """Copies the module where the monitor has hooks on it."""

    def __init__(self) -> None:
        self.copies: list[nn.Module] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.copies.append(pickle.loads(pickle.dumps(pl_module)))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.copies += [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]


def test_copies_of_a_monitored_module_are_plain():
    teacher, keeps = make_teacher(), KeepsTheBest()
    monitor = OTRTMonitor(every_n_steps=1, figures=False)
    trainer = make_trainer(max_epochs=1, callbacks=[keeps, make_callback(teacher), monitor])
    trainer.fit(make_task(ValidatedTask), loader(16), loader(16))
    assert len(keeps.copies) >= 4
    x, _ = next(iter(loader()))
    with forwards(teacher) as count:
        for copied in keeps.copies:
            copied.eval()(x)
            assert not hooks(copied), "those of copies take themselves off"
    assert not count


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_a_copy_of_an_attached_transfer_is_attached_to_nothing(kind):
    transfer, student = RepresentationTransfer(make_teacher(), {"block1": "block1"}), Net()
    x = torch.randn(8, 1, 8, 8)
    with transfer.attached(student):
        student(x)
        transfer.loss().backward()
        copied = copy.deepcopy(transfer) if kind == "deepcopy" else pickle.loads(pickle.dumps(transfer))
        assert transfer.is_attached
        assert not copied.is_attached
        other = copy.deepcopy(student)
        with copied.attached(other):
            student(x)
            other(x)
            assert copied.loss().item() == pytest.approx(transfer.loss().item(), rel=1e-6)
