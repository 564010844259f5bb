"""What is no teacher, no checkpoint of one, or no task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from bad_inputs.fits import Error
from bad_inputs.messages import assert_message
from bad_inputs.networks import OtherTask
from helpers import LAYERS, Net, Task, seeded
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_otrt import OTRTCallback, OTRTModule, load_teacher


class Bare(pl.LightningModule):
    """Has no forward."""


Y, X = torch.randn(4, 8, generator=torch.Generator().manual_seed(5)), torch.randn(6, 8)


def saved(path: Path, content: Any) -> str:
    torch.save(content, path / "teacher.ckpt")
    return str(path / "teacher.ckpt")


ARGUMENTS: list[tuple[str, Callable[[Path], Any], Error, tuple[str, ...]]] = [
    ("teacher None", lambda _: OTRTCallback(None), TypeError, ("`teacher`", "nn.Module", "NoneType")),
    ("teacher a class", lambda _: OTRTCallback(Net), TypeError, ("the class Net", "pass an instance")),
    ("teacher a state dict", lambda _: OTRTCallback({"w": X}), TypeError, ("a checkpoint with its class", "dict")),
    ("teacher without forward", lambda _: OTRTCallback(Bare()), TypeError, ("Bare", "no `forward`", "Define one")),
    (
        "teacher name misspelt",
        lambda _: load_teacher("resnet51"),
        ValueError,
        ("'resnet51'", "Did you mean 'resnet50'"),
    ),
    (
        "teacher weights misspelt",
        lambda _: load_teacher("resnet18:V9"),
        ValueError,
        ("'V9'", "IMAGENET1K_V1", "None for"),
    ),
    (
        "no such file",
        lambda p: load_teacher((str(p / "a.ckpt"), Net)),
        FileNotFoundError,
        ("no checkpoint file", "a.ckpt"),
    ),
    (
        "file without class",
        lambda p: load_teacher(saved(p, {})),
        TypeError,
        ("`model_class`", "None", "model_class=MyModule"),
    ),
    (
        "file lacks keys",
        lambda p: load_teacher((saved(p, {"body.weight": X}), Net)),
        ValueError,
        ("do not fit Net", "Missing: 'block1.0.weight'", "more", "Unexpected: 'body.weight'"),
    ),
    (
        "file refused by weights_only",
        lambda p: load_teacher((saved(p, seeded(0, Net)), Net)),
        RuntimeError,
        ("could not be read", "teacher.ckpt", "can run any code", "weights_only=False"),
    ),
    (
        "task no LightningModule",
        lambda _: OTRTModule(Net(), Net(), LAYERS),
        TypeError,
        ("`task` to be a LightningModule", "Net"),
    ),
    (
        "task of the other package",
        lambda _: OTRTModule(OtherTask(), Net(), LAYERS),
        TypeError,
        ("`task`", "`lightning` package", "OtherTask is one of `pytorch_lightning`", "import lightning as L"),
    ),
    (
        "task compiled",
        lambda _: OTRTModule(torch.compile(Task(), backend="eager"), Net(), LAYERS),
        TypeError,
        ("a compiled one", "Wrap it first, then compile"),
    ),
    (
        "task wrapped twice",
        lambda _: OTRTModule(OTRTModule(Task(), Net(), LAYERS), Net(), LAYERS),
        MisconfigurationException,
        ("wrapped by OTRTModule already", "OTRTCallback", "second teacher"),
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "words"), [case[1:] for case in ARGUMENTS], ids=[case[0] for case in ARGUMENTS]
)
def test_teachers_and_tasks(call: Callable[[Path], Any], error: Error, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(error) as raised:
        call(tmp_path)
    assert type(raised.value) is error
    assert_message(raised.value, words)
