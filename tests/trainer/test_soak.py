"""Long fits and many fits: neither memory nor hooks grow."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
from helpers import LAYERS, Task, ValidatedTask, hooks, loader, make_task, make_teacher, make_trainer
from torch import Tensor
from torch._subclasses import FakeTensor

from lightning_otrt import OTRTCallback, OTRTModule, OTRTMonitor

#: Of the process, in MiB. A single activation kept at each step would be three times as much after 2000 steps.
GROWTH = 8.0

#: Kinds of state between the steps: none, running sums, a kept plan, a rotation, and a cost with a running scale.
STATES: dict[str, dict[str, Any]] = {
    "batch": {"memory": 0},
    "running": {"memory": 0.98, "solve_every": 5},
    "static": {"plan": "static"},
    "rotation": {"plan": "orthogonal", "memory": 0.9, "solve_every": 5},
    "euclidean": {"cost": "euclidean", "memory": 0.9, "layers": "auto"},
}


def peak() -> float:
    """The most memory that this process ever held, in MiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


@pytest.fixture(autouse=True)
def _only_new_tensors() -> None:
    """Of other tests none is counted."""
    gc.collect()
    gc.freeze()


def tensors() -> tuple[int, int]:
    """How many tensors are alive, and their bytes."""
    gc.collect()
    # Not `isinstance`, which asks proxies of other packages for their class. Fake tensors, a compiler's, have no bytes.
    found = {
        id(item): item.nbytes
        for item in gc.get_objects()
        if issubclass(type(item), Tensor) and not issubclass(type(item), FakeTensor)
    }
    return len(found), sum(found.values())


class Watch(pl.Callback):
    """Counts what is alive at the end of some steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.seen: list[tuple[tuple[int, int], list[str]]] = []
        self.peaks: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.seen.append((tensors(), sorted(hooks(pl_module))))
            self.peaks.append(peak())


@pytest.mark.parametrize(
    ("steps", "state"), [(120, "running"), *(pytest.param(2000, state, marks=pytest.mark.slow) for state in STATES)]
)
def test_memory_is_flat_over_steps_of_training_and_validation(steps: int, state: str) -> None:
    """Two steps of validation follow each four of training."""
    watch = Watch(40)  # whole epochs of eight steps, and whole rounds of solves
    callback = OTRTCallback(make_teacher(), **{"layers": LAYERS, "weight": 2.0, **STATES[state]})
    trainer = make_trainer(
        max_steps=steps, val_check_interval=4, callbacks=[callback, OTRTMonitor(), watch], log_every_n_steps=8
    )
    task = make_task(ValidatedTask)
    trainer.fit(task, loader(), loader(16))
    assert trainer.global_step == steps
    assert callback.transfer.engine.calls == steps
    assert len(watch.seen) == steps // 40
    # Lazy state, such as the momentum of the optimizer, is there from the first look on.
    counts, kinds = zip(*watch.seen[1:], strict=True)
    assert set(counts) == {counts[0]}
    assert kinds[0]
    assert all(kind == kinds[0] for kind in kinds)
    assert watch.peaks[-1] - watch.peaks[len(watch.peaks) // 4] < GROWTH
    assert not hooks(task)


def by_one_callback(task: Task) -> Callable[[], Any]:
    callback = OTRTCallback(make_teacher(), LAYERS)
    return lambda: make_trainer(max_steps=1, callbacks=[callback]).fit(task, loader(16))


def by_new_callbacks(task: Task) -> Callable[[], Any]:
    teacher = make_teacher()
    return lambda: make_trainer(max_steps=1, callbacks=[OTRTCallback(teacher, "auto")]).fit(task, loader(16))


def by_wrapper(task: Task) -> Callable[[], Any]:
    wrapped = OTRTModule(task, make_teacher(), LAYERS)
    return lambda: make_trainer(max_steps=1).fit(wrapped, loader(16))


@pytest.mark.parametrize("way", [by_one_callback, by_new_callbacks, by_wrapper])
@pytest.mark.parametrize("fits", [7, pytest.param(200, marks=pytest.mark.slow)])
def test_many_fits_of_one_module(way: Callable[[Task], Callable[[], Any]], fits: int) -> None:
    task = make_task()
    fit = way(task)
    seen, peaks = [], []
    for _ in range(fits):
        fit()
        seen.append((tensors(), sorted(task.__dict__), hooks(task)))
        peaks.append(peak())
    assert seen[-1][2] == []
    assert "training_step" not in task.__dict__
    assert all(kind == seen[4] for kind in seen[4:])
    assert peaks[-1] - peaks[fits // 2] < GROWTH
