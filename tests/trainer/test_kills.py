"""Training runs that are killed at random moments and resumed end like the run that nobody killed, to the last bit.

A run is a process of its own that gets SIGKILL: half of the kills by the clock, the others inside a hook that is drawn
from a seed, so that they also meet the backward pass, the validation and the writing of a checkpoint.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import LAYERS, ValidatedTask, loader, make_data, make_teacher, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import CONTEXT, set_threads, start_server
from torch.utils.data import DataLoader, Sampler

from lightning_otrt import CosineDecay, LinearWarmup, OTRTCallback, OTRTModule

EPOCHS, SAMPLES, BATCH = 5, 48, 8
STEPS = EPOCHS * SAMPLES // BATCH
HOOKS = [
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_batch_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
]

#: What the term keeps between the steps. None is the control, without the term.
OPTIONS: dict[str, dict[str, Any] | None] = {
    "running cost": {"layers": LAYERS, "weight": 2.0, "memory": 0.9, "solve_every": 7},
    "static, found layers": {"layers": "auto", "plan": "static", "schedule": LinearWarmup(20)},
    "rotation": {"layers": "auto", "plan": "auto", "memory": 0.9, "solve_every": 7},
    "euclidean": {"layers": "penultimate", "cost": "euclidean", "solve_every": 5, "schedule": CosineDecay(STEPS)},
    "without": None,
}

Moment = tuple[str, int] | None


class Order(Sampler[int]):
    """An order of its own for each epoch, whenever that is begun; Lightning calls ``set_epoch``."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Any:
        return iter(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Seeded(ValidatedTask):
    """Random numbers of dropout that depend on the step alone; Lightning does not restore those of torch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(self.trainer.global_step)


class Killer(pl.Callback):
    """Kills its process in the n-th call of a hook, counted from the start of the process."""

    def __init__(self, moment: Moment) -> None:
        self.count = 0
        if moment is not None:
            self.hook, self.at = moment
            setattr(self, self.hook, self.kill)

    def kill(self, *args: Any, **options: Any) -> None:
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def last_checkpoint(folder: Path) -> Path | None:
    """The last after which there is something left to train; a resumed run would log nothing otherwise."""
    found = {int(re.findall(r"\d+", path.name)[0]): path for path in folder.glob("epoch=*.ckpt")}
    found.pop(EPOCHS - 1, None)
    return found[max(found)] if found else None


def train(folder: Path, options: dict[str, Any] | None, wrapped: bool, moment: Moment) -> None:
    """Begin or go on with a run in a folder, and leave its outcome there."""
    set_threads()
    torch.manual_seed(0)
    task = Seeded(dropout=0.3)
    callbacks: list[Any] = [
        Killer(moment),
        ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
    ]
    model, transfer = task, None
    if options is not None and wrapped:
        model = OTRTModule(task, make_teacher(), **options)
        transfer = model.otrt
    elif options is not None:
        callbacks.append(OTRTCallback(make_teacher(), **options))
        transfer = callbacks[-1].transfer
    trainer = make_trainer(max_epochs=EPOCHS, callbacks=callbacks, enable_checkpointing=True, default_root_dir=folder)
    path = last_checkpoint(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = DataLoader(make_data(SAMPLES), batch_size=BATCH, sampler=Order())
        trainer.fit(model, data, loader(16), ckpt_path=path, weights_only=True if path else None)
    assert trainer.global_step == STEPS
    outcome = {
        "weights": task.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "transfer": None if transfer is None else transfer.state_dict(),
        "logged": dict(trainer.callback_metrics),
    }
    torch.save(outcome, folder / "outcome.pt.part")
    (folder / "outcome.pt.part").rename(folder / "outcome.pt")


def run(folder: Path, options: Any, wrapped: bool, moment: Moment = None, delay: float | None = None) -> bool:
    """Whether the run came to its end."""
    process = CONTEXT.Process(target=train, args=(folder, options, wrapped, moment))
    process.start()
    process.join(120 if delay is None else delay)
    if process.is_alive():
        assert delay is not None, "the run hangs"
        process.kill()
        process.join()
    code = process.exitcode
    process.close()
    assert code in (0, -signal.SIGKILL), f"exit code {code}"
    return code == 0


def flat(value: Any, where: str = "") -> dict[str, Any]:
    """Nested state by path, tensors as their type and bytes."""
    if isinstance(value, torch.Tensor):
        return {where: (value.dtype, tuple(value.shape), value.detach().numpy().tobytes())}
    if isinstance(value, dict):
        return {key: item for name, part in value.items() for key, item in flat(part, f"{where}/{name}").items()}
    if isinstance(value, (list, tuple)):
        return {key: item for name, part in enumerate(value) for key, item in flat(part, f"{where}/{name}").items()}
    return {where: value}


def survive(folder: Path, options: Any, wrapped: bool, kills: int, seed: int) -> int:
    """Kill runs, resume each until it ends, and compare what they end with; how many of the kills hit."""
    start_server()
    whole = folder / "whole"
    whole.mkdir()
    began = time.monotonic()
    assert run(whole, options, wrapped)
    duration = time.monotonic() - began
    expected = flat(torch.load(whole / "outcome.pt"))
    draw = random.Random(seed)
    hit, chain = 0, 0
    while hit < kills:
        path = folder / f"chain{chain}"
        path.mkdir()
        done, deaths = False, 0
        while not done:
            if hit == kills or deaths == 5:
                done = run(path, options, wrapped)
                assert done
                break
            if draw.random() < 0.5:
                done = run(path, options, wrapped, delay=draw.uniform(0.2, 1.0) * duration)
            else:
                done = run(path, options, wrapped, (draw.choice(HOOKS), draw.randint(1, STEPS // 2)))
            deaths += not done
            hit += not done
        found = flat(torch.load(path / "outcome.pt"))
        assert list(found) == list(expected)
        assert not [key for key, value in expected.items() if found[key] != value], f"chain {chain}, {deaths} kills"
        chain += 1
        assert chain <= 4 * kills, "almost no kill comes in time"
    return hit


@pytest.mark.parametrize(
    ("kind", "wrapped", "kills", "seed"),
    [
        ("running cost", False, 1, 2),
        pytest.param("running cost", False, 20, 20, marks=pytest.mark.slow),
        pytest.param("static, found layers", False, 10, 10, marks=pytest.mark.slow),
        pytest.param("euclidean", False, 10, 10, marks=pytest.mark.slow),
        pytest.param("rotation", False, 10, 10, marks=pytest.mark.slow),
        pytest.param("running cost", True, 10, 11, marks=pytest.mark.slow),
        pytest.param("without", False, 10, 10, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_like_one_that_was_not(
    kind: str, wrapped: bool, kills: int, seed: int, tmp_path: Path
) -> None:
    assert survive(tmp_path, OPTIONS[kind], wrapped, kills, seed) == kills
