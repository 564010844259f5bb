"""What a fit did: the term of each step, and whether it had an effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
from bad_inputs.fits import KEPT, Fit
from helpers import Task, differ, make_trainer, weights
from torch import nn

from lightning_otrt import RepresentationTransfer


@dataclass
class Seen:
    """What a fit did."""

    case: Fit
    task: Task
    teacher: nn.Module
    transfer: RepresentationTransfer
    logged: list[dict[str, float]]

    @property
    def terms(self) -> list[float | None]:
        """The term of each step, None for a step without."""
        return [values.get("train/otrt") for values in self.logged]

    @property
    def is_changed(self) -> bool:
        """Whether the term made a difference to the weights."""
        task = self.case.task()
        make_trainer(max_epochs=1).fit(task, self.case.data())
        return differ(weights(self.task), weights(task))


class Log(pl.Callback):
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        # The Trainer keeps what earlier steps logged.
        has_term = any(not distance.is_skipped for distance in KEPT[0].distances)
        names = [name for name in trainer.logged_metrics if has_term or name == "otrt/weight"]
        self.logged.append({name: float(trainer.logged_metrics[name]) for name in names})


def check_terms(seen: Seen) -> None:
    """Each step has a term."""
    assert seen.terms
    assert all(term is not None and 0 < term < 2 for term in seen.terms), seen.terms


def check_all(seen: Seen) -> None:
    """Each step has a term, and it has an effect."""
    check_terms(seen)
    assert seen.is_changed


def check_none(seen: Seen) -> None:
    """No step has a term, and the fit is the fit without one."""
    assert seen.terms == [None] * len(seen.terms)
    assert not seen.is_changed


def check_steps(*wanted: bool) -> Callable[[Seen], None]:
    """Which steps have a term."""

    def check(seen: Seen) -> None:
        assert [term is not None for term in seen.terms] == list(wanted)
        assert seen.is_changed

    return check


def check_value(value: float, *, changed: bool) -> Callable[[Seen], None]:
    """All terms have one value."""

    def check(seen: Seen) -> None:
        assert seen.terms == pytest.approx([value] * len(seen.terms), abs=1e-3)
        assert all(tensor.isfinite().all() for tensor in weights(seen.task).values())
        assert seen.is_changed == changed

    return check
