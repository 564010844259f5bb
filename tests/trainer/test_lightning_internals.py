"""What Lightning does not document is there in the installed version; without it there are substitutes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from helpers import LAYERS, loader, make_task, make_teacher, make_trainer

from lightning_otrt import OTRTCallback
from lightning_otrt.trainer import lightning_internals
from lightning_otrt.trainer.lightning_internals import batch_number, batches_before, is_being_spawned, logged_step


class Counters(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.seen.append((batch_number(trainer), batches_before(trainer), trainer.global_step))


def test_the_counters_of_the_installed_version() -> None:
    counters = Counters()
    options = {"max_epochs": 2, "max_steps": -1, "accumulate_grad_batches": 2}
    make_trainer(callbacks=[counters], **options).fit(make_task(), loader())
    batches = len(loader())
    assert [each[0] for each in counters.seen] == [*range(1, 2 * batches + 1)]
    assert [each[1] for each in counters.seen] == [*range(2 * batches)]
    assert counters.seen[-1][2] == batches - 1, "optimizer steps are fewer"


def test_substitutes() -> None:
    trainer: Any = SimpleNamespace(global_step=3, fit_loop=SimpleNamespace())
    assert batch_number(trainer) is None
    assert batches_before(trainer) == logged_step(trainer) == 3


def test_the_step_that_is_logged() -> None:
    task = make_task()
    trainer = make_trainer(callbacks=[OTRTCallback(make_teacher(), LAYERS)], max_epochs=1, accumulate_grad_batches=2)
    trainer.fit(task, loader())
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == logged_step(trainer) == 4
    del trainer.fit_loop.epoch_loop.__dict__["_batches_that_stepped"]
    assert logged_step(trainer) == trainer.global_step == 4


def test_nothing_is_being_spawned_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lightning_internals.get_spawning_popen is not None
    assert not is_being_spawned()
    monkeypatch.setattr(lightning_internals, "get_spawning_popen", None)
    assert not is_being_spawned()
