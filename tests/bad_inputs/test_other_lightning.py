"""Modules and Trainers of `pytorch_lightning` beside those of `lightning`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as other_lightning
from bad_inputs.fits import Error, assert_nothing_left
from bad_inputs.messages import assert_message, collected_warnings
from bad_inputs.networks import OtherTask
from helpers import LAYERS, loader, make_task, make_teacher, make_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_otrt import OTRTCallback, OTRTModule


def other_trainer(**options: Any) -> Any:
    silent = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return other_lightning.Trainer(accelerator="cpu", max_steps=2, logger=False, **silent, **options)


OTHERS: list[tuple[str, Callable[[], Any], Callable[[Any], Any], Callable[[], nn.Module], Error, tuple[str, ...]]] = [
    (
        "Trainer and module of the other package",
        lambda: other_trainer(callbacks=[OTRTCallback(make_teacher(), dict(LAYERS))]),
        lambda task: task,
        OtherTask,
        MisconfigurationException,
        (
            "OTRTCallback is a callback of the `lightning` package",
            "one of `pytorch_lightning`",
            "import lightning as L",
        ),
    ),
    (
        "module of the other package",
        lambda: make_trainer(callbacks=[OTRTCallback(make_teacher(), dict(LAYERS))]),
        lambda task: task,
        OtherTask,
        TypeError,
        ("must be a `LightningModule`", "OtherTask"),
    ),
    (
        "Trainer of the other package",
        lambda: other_trainer(callbacks=[OTRTCallback(make_teacher(), dict(LAYERS))]),
        lambda task: task,
        make_task,
        TypeError,
        ("must be a `LightningModule`", "Task"),
    ),
    (
        "wrapped, with a Trainer of the other package",
        other_trainer,
        lambda task: OTRTModule(task, make_teacher(), dict(LAYERS)),
        make_task,
        TypeError,
        ("must be a `LightningModule`", "Task"),
    ),
]


@pytest.mark.parametrize(
    ("trainer", "wrap", "make", "error", "words"), [case[1:] for case in OTHERS], ids=[case[0] for case in OTHERS]
)
def test_the_other_lightning_package(
    trainer: Callable[[], Any],
    wrap: Callable[[Any], Any],
    make: Callable[[], nn.Module],
    error: Error,
    words: tuple[str, ...],
) -> None:
    task = make()
    with collected_warnings(), pytest.raises(error) as raised:
        trainer().fit(wrap(task), loader(16))
    assert_message(raised.value, words)
    assert_nothing_left(task, make_teacher())
