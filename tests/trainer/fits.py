"""Fits with the callback that tests of several subjects share, and what they look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from helpers import (
    LAYERS,
    Task,
    hooks,
    loader,
    make_task,
    make_teacher,
    make_trainer,
)
from torch import nn

from lightning_otrt import OTRTCallback


def make_callback(teacher: nn.Module | None = None, **options: Any) -> OTRTCallback:
    return OTRTCallback(make_teacher() if teacher is None else teacher, **{"layers": LAYERS, "weight": 2.0, **options})


def fitted(callbacks: list[Any], *, task: Task | None = None, **options: Any) -> Task:
    task = make_task() if task is None else task
    make_trainer(callbacks=callbacks, **options).fit(task, loader())
    return task


def state_of(module: nn.Module) -> dict[str, Any]:
    """All that a fit must give back: bytes, devices, modes and flags."""
    return {
        "bytes": {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()},
        "modes": {name: part.training for name, part in module.named_modules()},
        "flags": {name: (p.requires_grad, p.device, p.dtype, p.grad) for name, p in module.named_parameters()},
        "attributes": {name: sorted(part.__dict__) for name, part in module.named_modules()},
        "hooks": hooks(module),
    }


class Seen(pl.Callback):
    """Logged values after each step, and those in the progress bar."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []
        self.bar: list[str] = []
        self.results: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.values.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.bar = sorted(trainer.progress_bar_metrics)
        self.results = {item.meta.name: item for item in trainer._results.values()}
        assert not any(item.value.requires_grad for item in self.results.values())


def resuming_trainer(path: Path, **options: Any) -> pl.Trainer:
    return make_trainer(default_root_dir=path, **options)
