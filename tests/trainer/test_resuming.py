"""Checkpoints are those of the plain module, and a resumed run is the uninterrupted one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    LAYERS,
    Task,
    ValidatedTask,
    assert_same,
    hooks,
    loader,
    make_task,
    make_teacher,
    make_trainer,
    weights,
)
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader
from trainer.fits import Seen, fitted, make_callback, resuming_trainer

from lightning_otrt import CosineDecay, LinearWarmup, LogitDistillation, OTRTCallback, OTRTModule

RESUMED = [
    {},
    {"memory": 0.9, "solve_every": 3},
    {"cost": "euclidean", "memory": 0.9, "solve_every": 5},
    {"plan": "static"},
    {"plan": "random", "seed": 3},
    {"plan": "exact", "solve_every": 7},
    {"plan": "orthogonal", "memory": 0.9, "solve_every": 3},
    {"plan": "orthogonal", "cost": "covariance", "layers": "auto"},
    {"plan": "random_orthogonal", "seed": 3, "memory": 0.9, "solve_every": 3},
    {"schedule": LinearWarmup(12), "layers": "auto"},
    {"schedule": CosineDecay(12), "layers": "penultimate"},
    {"distillation": 1.0, "weight": 0},
    {"distillation": LogitDistillation(features="block2")},
]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize(
    ("options", "at", "way"),
    [
        *((options, "mid-epoch", "callback") for options in RESUMED),
        (RESUMED[1], "epoch end", "callback"),
        *((RESUMED[1], at, "wrapper") for at in ("mid-epoch", "epoch end")),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, options, at, way):
    """Weights, plan, statistics and schedule; eight steps are an epoch."""
    options = {"layers": LAYERS, "weight": 2.0, **options}

    def run(steps: int, path: str | None, *callbacks: Any) -> tuple[Task, Any, dict[str, float]]:
        # Other initial weights than those in the checkpoint: what is not loaded shows.
        task = make_task(Batches) if path is None else Batches()
        callback = OTRTCallback(make_teacher(), **options)
        model = task if way == "callback" else OTRTModule(task, make_teacher(), **options)
        transfer = callback.transfer if way == "callback" else model.otrt
        seen = Seen()
        trainer = resuming_trainer(
            tmp_path,
            max_steps=steps,
            callbacks=[seen, *([callback] if way == "callback" else []), *callbacks],
            enable_checkpointing=bool(callbacks),
        )
        trainer.fit(model, ckpt_path=path, weights_only=None if path is None else True)
        return task, transfer, seen.values[-1]

    stop = 8 if at == "epoch end" else 5
    whole, expected, logged = run(12, None)
    run(stop, None, ModelCheckpoint(tmp_path / way, filename="here", every_n_train_steps=stop, save_top_k=-1))
    resumed, found, logged_again = run(12, str(tmp_path / way / "here.ckpt"))
    assert_same(weights(resumed), weights(whole))
    assert logged_again == logged
    assert found.step == expected.step
    assert flat(found.state_dict()) == flat(expected.state_dict())
    checkpoint = torch.load(tmp_path / way / "here.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(make_task().state_dict())
    assert not [key for key in flat(checkpoint["callbacks"]) if "teacher" in key.rpartition("}")[2]]


def flat(value: Any, where: str = "") -> dict[str, Any]:
    """Nested state as plain values by path."""
    if isinstance(value, Tensor):
        return {where: (value.dtype, value.tolist())}
    if isinstance(value, dict):
        return {key: item for name, part in value.items() for key, item in flat(part, f"{where}/{name}").items()}
    if isinstance(value, (list, tuple)):
        return {key: item for name, part in enumerate(value) for key, item in flat(part, f"{where}/{name}").items()}
    return {where: value}


BATCHES = list(loader())


class Batches(Task):
    """Brings its own data, whose position Lightning restores in the middle of an epoch."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        # The batch by its index: a plain DataLoader starts from the beginning when an epoch is resumed in its middle.
        return super().training_step(BATCHES[batch_idx], batch_idx)


def test_a_checkpoint_is_that_of_the_plain_module(tmp_path):
    task = make_task()
    trainer = resuming_trainer(tmp_path, callbacks=[make_callback()])
    trainer.fit(task, loader())
    trainer.save_checkpoint(tmp_path / "fitted.ckpt")
    checkpoint = torch.load(tmp_path / "fitted.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(make_task().state_dict())
    assert checkpoint["hyper_parameters"] == {"width": 4, "lr": 0.1, "dropout": 0.0, "norm": True}
    loaded = Task.load_from_checkpoint(tmp_path / "fitted.ckpt")
    assert_same(weights(loaded), weights(task))
    assert type(loaded) is Task
    assert (tmp_path / "fitted.ckpt").stat().st_size < 60_000


def test_the_best_checkpoint_can_be_tested(tmp_path):
    task = make_task(ValidatedTask)
    saver = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = resuming_trainer(tmp_path, callbacks=[make_callback(), saver], max_epochs=2, enable_checkpointing=True)
    trainer.fit(task, loader(), loader(16))
    (found,) = trainer.test(task, loader(16), ckpt_path="best", weights_only=True)
    best = torch.load(saver.best_model_path, weights_only=True)
    assert_same(weights(task), best["state_dict"])
    assert found["test_loss"] == pytest.approx(float(saver.best_model_score), rel=1e-6)
    assert not hooks(task)


def test_a_monitored_term_stops_early():
    stopper = EarlyStopping("train/otrt", mode="max", patience=0, check_on_train_epoch_end=True)
    task = fitted([make_callback(), stopper], max_epochs=20)
    assert task.trainer.current_epoch < 20
    assert not hooks(task)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": "penultimate"}, ": `layers` changed, so that"),
        ({"weight": 5.0, "epsilon": 0.02}, None),
    ],
)
def test_resuming_with_other_settings(tmp_path, change, words):
    trainer = resuming_trainer(tmp_path, callbacks=[make_callback()])
    trainer.fit(make_task(), loader())
    trainer.save_checkpoint(tmp_path / "here.ckpt")
    again = make_trainer(callbacks=[make_callback(**change)], max_steps=6)
    if words is None:
        again.fit(make_task(), loader(), ckpt_path=tmp_path / "here.ckpt", weights_only=True)
        assert again.global_step == 6
        return
    with pytest.raises(MisconfigurationException, match=words):
        again.fit(make_task(), loader(), ckpt_path=tmp_path / "here.ckpt", weights_only=True)
