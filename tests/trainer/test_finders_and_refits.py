"""Finders of learning rate and batch size see the term; later fits start afresh."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
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
    seeded,
    weights,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader
from trainer.fits import fitted, make_callback, resuming_trainer

from lightning_otrt import OTRTCallback
from lightning_otrt.trainer.reevaluations import Reevaluations


class Sized(Task):
    batch_size = 4

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(batch_size=self.batch_size)


def finder_lr(callbacks: list[Any], how: str, tmp_path: Path) -> tuple[float, list[float], Task]:
    task = make_task()
    trainer = resuming_trainer(
        tmp_path,
        callbacks=[*callbacks, *([LearningRateFinder(num_training_steps=8)] if how == "callback" else [])],
        max_epochs=1,
        enable_checkpointing=True,
    )
    if how == "tuner":
        found = Tuner(trainer).lr_find(task, loader(), num_training=8)
        losses = found.results["loss"]
    else:
        trainer.fit(task, loader())
        losses = next(c for c in trainer.callbacks if isinstance(c, LearningRateFinder)).optimal_lr.results["loss"]
    return task.lr, losses, task


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("how", ["tuner", "callback"])
def test_the_learning_rate_is_found_with_the_term(how, tmp_path):
    callback = make_callback(weight=20.0)
    _, losses, task = finder_lr([callback], how, tmp_path)
    _, plain, _ = finder_lr([], how, tmp_path)
    assert len(losses) == len(plain)
    assert losses[0] > plain[0] + 1, "the finder trained without the term"
    assert not hooks(task)
    if how == "callback":
        assert callback.transfer.engine.calls == 8, "the trial steps of the finder were counted"


def test_batch_sizes_are_found_with_the_term(tmp_path):
    callback = make_callback()
    task = make_task(Sized)
    trainer = resuming_trainer(
        tmp_path,
        callbacks=[callback, BatchSizeFinder(steps_per_trial=1, max_trials=2)],
        max_epochs=1,
        enable_checkpointing=True,
    )
    with forwards(callback.transfer.teacher.module) as count:
        trainer.fit(task)
    assert task.batch_size == 4  # from 2, doubled in the second trial
    assert callback.transfer.engine.calls == 16
    assert len(count) > 16 + 1, "the trials ran without the term"
    assert not hooks(task)


def test_a_resume_with_a_finder_keeps_the_state(tmp_path):
    """The finder restores its own checkpoint into the callback, which is no resume."""
    trainer = resuming_trainer(tmp_path, callbacks=[make_callback(memory=0.9)], max_epochs=1)
    trainer.fit(make_task(), loader())
    engine = trainer.callbacks[0].transfer.engine
    count = engine.states[0].sums[0]
    assert engine.calls == 8
    assert count.item() == pytest.approx(8 * 4 * 4 * sum(0.9**age for age in range(8)))


@pytest.mark.parametrize("how", ["one trainer", "two trainers"])
def test_fitting_twice(how):
    """The second fit starts from fresh plans, as a new callback would."""
    callback, task = make_callback(memory=0.9), make_task()
    trainer = make_trainer(callbacks=[callback])
    trainer.fit(task, loader())
    first = weights(task)
    if how == "one trainer":
        trainer.fit_loop.epoch_loop.max_steps = 8
        trainer.fit(task, loader())
    else:
        make_trainer(callbacks=[callback]).fit(task, loader())
    assert callback.transfer.engine.calls == 4
    assert differ(weights(task), first)
    other = make_task()
    other.load_state_dict(first)
    if how == "two trainers":
        make_trainer(callbacks=[make_callback(memory=0.9)]).fit(other, loader())
        assert_same(weights(other), weights(task))
    assert not hooks(task)


def test_one_callback_for_two_modules():
    callback = make_callback()
    first, second = fitted([callback]), make_task(width=8)
    make_trainer(callbacks=[callback]).fit(second, loader())
    fresh = make_task(width=8)
    make_trainer(callbacks=[make_callback()]).fit(fresh, loader())
    assert_same(weights(second), weights(fresh))
    assert not hooks(first, second)


class Loads(Sized, ValidatedTask):
    """With loaders of its own, for the finder of batch sizes."""

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(16)


def engine_calls_at_start(callback: Any, callbacks: Sequence[Any], path: Path) -> list[int]:
    """The number of calls behind the engine's plans when the first batch of a fit starts."""
    found: list[int] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            found.append(callback.transfer.run_state.calls)

    trainer = resuming_trainer(path, callbacks=[callback, *callbacks, Look()], max_steps=2, enable_checkpointing=True)
    trainer.fit(make_task(Loads))
    return found[-2:]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("what", ["test", "validate", "LearningRateFinder", "BatchSizeFinder"])
def test_a_checkpoint_that_is_no_resume_starts_no_run(what, tmp_path):
    """Lightning loads states to test, too, and finders load what they have saved before their trials."""
    callback, path = make_callback(), tmp_path / "fit.ckpt"
    trainer = make_trainer(callbacks=[callback])
    trainer.fit(make_task(ValidatedTask), loader(), loader(16))
    trainer.save_checkpoint(path)
    if what in ("test", "validate"):
        getattr(make_trainer(callbacks=[callback]), what)(
            make_task(ValidatedTask), loader(), ckpt_path=path, verbose=False
        )
        finders = []
    else:
        finders = [LearningRateFinder(num_training_steps=8) if "Rate" in what else BatchSizeFinder(max_trials=1)]
    assert engine_calls_at_start(callback, finders, tmp_path) == [0, 1]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
def test_a_test_takes_a_checkpoint_of_other_layers(tmp_path):
    trainer = make_trainer(callbacks=[make_callback()])
    trainer.fit(make_task(ValidatedTask), loader(), loader(16))
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    other = OTRTCallback(make_teacher(), {"net.block2": "block1"})
    options = {"ckpt_path": tmp_path / "fit.ckpt", "verbose": False}
    make_trainer(callbacks=[other]).test(make_task(ValidatedTask), loader(), **options)
    with pytest.raises(MisconfigurationException, match="Resume with the same ones"):
        make_trainer(callbacks=[other]).fit(
            make_task(ValidatedTask), loader(), loader(16), ckpt_path=tmp_path / "fit.ckpt"
        )


def test_a_state_that_is_loaded_by_hand_goes_on(tmp_path):
    first = make_callback()
    make_trainer(callbacks=[first]).fit(make_task(), loader())
    second = make_callback()
    second.load_state_dict(first.state_dict())
    assert engine_calls_at_start(second, [], tmp_path)[-1] == 5


class SecondOrder(Task):
    """LBFGS, by the Trainer or by hand."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.automatic_optimization = not by_hand
        self.steps: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=5)


def test_closures_under_manual_optimization_are_one_batch():
    """As in automatic optimization: plans, statistics and step stay while an optimizer evaluates a batch again."""
    trained = []
    for by_hand in (False, True):
        callback, task = make_callback(memory=0.9), seeded(0, SecondOrder, by_hand)
        make_trainer(callbacks=[callback], max_epochs=1).fit(task, loader(32))
        assert callback.transfer.engine.calls == 4
        assert not task.trainer.optimizers[0]._optimizer_step_pre_hooks
        trained.append(weights(task))
    assert_same(*trained)


class Accumulating(Task):
    """Two micro-batches in one step of an optimizer, in a closure or without one."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], *, closes: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.kind, self.closes = optimizer, closes

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> None:
            optimizer.zero_grad()
            for part in zip(*(tensor.chunk(2) for tensor in batch), strict=True):
                self.manual_backward(self.loss(list(part)) / 2)

        if self.closes:
            optimizer.step(closure=closure)
        else:
            closure()
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters(), lr=0.1)


def test_micro_batches_in_a_closure_are_batches_of_their_own():
    trained = []
    for closes in (False, True):
        callback = make_callback(memory=0.9, distillation=1.0)
        task = seeded(0, Accumulating, torch.optim.SGD, closes=closes)
        make_trainer(callbacks=[callback], max_epochs=1).fit(task, loader(32))
        assert callback.transfer.engine.calls == 8
        trained.append(weights(task))
    assert_same(*trained)


def test_a_closure_that_fails_leaves_no_step_open():
    again = Reevaluations()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

    def closure() -> Tensor:
        assert not again.is_again()
        raise ValueError("no loss")

    again.watch([optimizer])
    with pytest.raises(ValueError, match="no loss"):
        optimizer.step(closure)
    again.watch([optimizer])
    assert not again.is_again()
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    again.stop()
    assert not optimizer._optimizer_step_pre_hooks


class FinderInEachEpoch(LearningRateFinder):
    """As Lightning's documentation writes it for fine-tuning."""

    def on_fit_start(self, *args: Any) -> None:
        """Not here."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("options", [{"memory": 0.9, "solve_every": 3}, {"plan": "orthogonal", "distillation": 1.0}])
def test_a_finder_between_epochs_changes_nothing(options, is_first, tmp_path):
    """A finder counts its batches from 0, as the epoch behind it does: equal numbers are other batches."""
    found, calls = [], []
    for has_finder in (False, True):
        callback = make_callback(**options)
        finders = [FinderInEachEpoch(num_training_steps=5, update_attr=False)] if has_finder else []
        callbacks = [*finders, callback] if is_first else [callback, *finders]
        task = make_task(norm=False)
        make_trainer(max_epochs=3, default_root_dir=tmp_path, callbacks=callbacks).fit(task, loader(32))
        found.append(weights(task))
        calls.append(callback.transfer.run_state.calls)
    assert calls == [12, 12]
    assert_same(*found)
