"""Finders of learning rate and batch size see the term; later fits start afresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import (
    Task,
    assert_same,
    differ,
    forwards,
    hooks,
    loader,
    make_task,
    make_trainer,
    weights,
)
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
)
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader
from trainer.fits import fitted, make_callback, resuming_trainer


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
