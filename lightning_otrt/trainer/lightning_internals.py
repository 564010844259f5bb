"""The only uses of what Lightning and Python do not document, with substitutes for versions that have no such thing."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

try:
    from multiprocessing.context import get_spawning_popen
except ImportError:  # pragma: no cover
    get_spawning_popen = None  # type: ignore[assignment]

__all__ = ["batch_number", "batches_before", "is_being_spawned", "logged_step"]


def batch_number(trainer: pl.Trainer) -> int | None:
    """The number of the training batch, which stays the same while an optimizer evaluates it again.

    It also counts in a learning rate finder, which takes the callbacks of the Trainer away. None: not known.
    """
    return _read(trainer, "fit_loop.epoch_loop.batch_progress.total.ready", None)


def batches_before(trainer: pl.Trainer) -> int:
    """The number of training batches before this one, over all epochs. Else the number of optimizer steps."""
    return int(_read(trainer, "fit_loop.total_batch_idx", trainer.global_step))


def logged_step(trainer: pl.Trainer) -> int:
    """The step at which the Trainer logs this batch, so that both are in one row of a CSV file.

    With several optimizers it differs from ``global_step``, which takes its place where it is not known.
    """
    return int(_read(trainer, "fit_loop.epoch_loop._batches_that_stepped", trainer.global_step))


def is_being_spawned() -> bool:
    """Whether an object is being pickled for a new process, as by ``strategy="ddp_spawn"``, and not to be saved."""
    return get_spawning_popen is not None and get_spawning_popen() is not None


def _read(trainer: pl.Trainer, path: str, default: Any) -> Any:
    found: Any = trainer
    for name in path.split("."):
        if not hasattr(found, name):
            return default
        found = getattr(found, name)
    return found
