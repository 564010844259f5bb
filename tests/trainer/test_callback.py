"""What a fit with the callback leaves on module, teacher and disk, what it logs, and how it resumes."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import (
    LAYERS,
    Net,
    Task,
    ValidatedTask,
    assert_same,
    differ,
    forwards,
    hooks,
    loader,
    make_data,
    make_task,
    make_teacher,
    make_trainer,
    needs_averaging,
    weights,
)
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_otrt import CosineDecay, LinearWarmup, OTRTCallback, OTRTModule
from lightning_otrt.reading.views import View


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


def random_state() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


# A weight of zero, and of next to nothing


@pytest.mark.filterwarnings("ignore:The weight of the transfer term was 0 in all 4 training steps")
@pytest.mark.parametrize("schedule", [None, lambda step: 0.0])
@pytest.mark.parametrize("layers", [LAYERS, "auto"])
def test_a_weight_of_zero_is_a_fit_without_the_plugin(layers, schedule):
    teacher = make_teacher()
    callback = make_callback(teacher, layers=layers, weight=0.0 if schedule is None else 1.0, schedule=schedule)
    with forwards(teacher) as count:
        torch.manual_seed(7)
        found = fitted([callback], task=make_task(dropout=0.5))
        after = random_state()
    torch.manual_seed(7)
    assert_same(weights(found), weights(fitted([], task=make_task(dropout=0.5))))
    assert after == random_state()
    assert not count
    assert not callback.transfer.pairs


def test_a_schedule_that_starts_at_zero():
    """Nothing before it rises, all of the term after."""
    callback = make_callback(schedule=lambda step: float(step >= 2))
    seen = Seen()
    with forwards(callback.transfer.teacher.module) as count:
        fitted([callback, seen])
    assert [values["otrt/weight"] for values in seen.values] == [0.0, 0.0, 2.0, 2.0]
    assert ["train/otrt" in values for values in seen.values] == [False, False, True, True]
    assert len(count) == 3  # the first also traces the layers


@pytest.mark.parametrize("layers", [LAYERS, "auto", "penultimate"])
@pytest.mark.parametrize("plan", ["sinkhorn", "random"])
def test_a_weight_of_next_to_nothing_leaves_random_numbers_and_statistics_alone(layers, plan):
    options = {"dropout": 0.5}
    torch.manual_seed(7)
    found = fitted([make_callback(make_teacher(), layers=layers, plan=plan, weight=1e-30)], task=make_task(**options))
    after = random_state()
    torch.manual_seed(7)
    plain = fitted([], task=make_task(**options))
    assert after == random_state()
    found, plain = weights(found), weights(plain)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)
    assert_same(
        *({name: v for name, v in side.items() if "running" in name or "batches" in name} for side in (found, plain))
    )


# What is left behind


class Failing(ValidatedTask):
    """Raises in one place, after the student ran."""

    place = ""
    error: BaseException = RuntimeError("on purpose")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.place == "training_step" and batch_idx == 2:
            raise self.error
        if self.place == "stop" and batch_idx == 2:
            self.trainer.should_stop = True
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        if self.place == "backward" and self.trainer.global_step == 2:
            raise self.error

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.place == "validation" and not self.trainer.sanity_checking:
            raise self.error
        if self.place == "sanity":
            raise self.error

    def configure_optimizers(self) -> Any:
        if self.place == "optimizers":
            raise self.error
        return super().configure_optimizers()


class FailingSetup(pl.Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        raise self.error


#: Where a fit ends; the callback is to clean up in all of them.
PLACES = [
    "nowhere",
    "stop",
    "training_step",
    "backward",
    "validation",
    "sanity",
    "optimizers",
    "setup",
    "forward",
    "term",
]


ENDS = [
    *((place, RuntimeError("on purpose"), "callback", None) for place in PLACES),
    *((place, KeyboardInterrupt(), "callback", None) for place in ("training_step", "backward", "validation", "term")),
    *((place, RuntimeError("on purpose"), "wrapper", None) for place in ("nowhere", "training_step", "setup", "term")),
    *((place, RuntimeError("on purpose"), "callback", "bfloat16") for place in ("nowhere", "training_step", "term")),
]


@pytest.mark.parametrize(
    ("place", "error", "way", "dtype"),
    ENDS,
    ids=[" ".join(filter(None, (place, type(error).__name__, way, dtype))) for place, error, way, dtype in ENDS],
)
def test_nothing_is_left_behind(place, error, way, dtype):
    teacher = make_teacher()
    teacher.head.requires_grad_(False)
    teacher.block1.eval()
    task = make_task(Failing)
    before, attributes = state_of(teacher), state_of(task)["attributes"]
    task.place, task.error = place, error
    options = {"layers": LAYERS, "weight": 2.0, "teacher_dtype": dtype}
    if place == "term":
        options["cost"] = failing_cost(error)
    if place == "forward":
        task.net.head.register_forward_pre_hook(lambda *_: raise_after(task, error))
    callback = None if way == "wrapper" else OTRTCallback(teacher, **options)
    model = OTRTModule(task, teacher, **options) if way == "wrapper" else task
    callbacks = [callback] if way == "callback" else []
    if place == "setup":
        callbacks.append(FailingSetup(error))
    with watched_views() as views:
        if place in ("nowhere", "stop"):
            fit_with_validation(model, callbacks)
        else:
            with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt), match=r"on purpose|^$|0|1"):
                fit_with_validation(model, callbacks)
    transfer = model.otrt if way == "wrapper" else callback.transfer
    task.place = ""
    task.train()
    task.net.head._forward_pre_hooks.clear()
    expected = {name: list(names) for name, names in attributes.items()}
    found = state_of(task)["attributes"]
    assert set(found[""]) - set(expected[""]) <= {"place", "error"}
    assert {name: found[name] for name in found if name} == {name: expected[name] for name in expected if name}
    assert not hooks(task, teacher)
    assert "training_step" not in task.__dict__
    assert state_of(teacher) == before
    assert not transfer.is_attached
    assert not transfer.has_views
    error.__traceback__ = error.__context__ = None  # its frames hold what was recorded
    gc.collect()
    assert not [view for view in views if view() is not None]
    assert torch._dynamo.eval_frame._stance.stance != "force_eager"
    # The same objects can be fitted afterwards.
    if place != "term":
        make_trainer(callbacks=[callback] if way == "callback" else []).fit(model, loader(), loader(16))
        assert transfer.engine.calls == 4


def fit_with_validation(model: Any, callbacks: list[Any]) -> None:
    make_trainer(callbacks=callbacks, max_epochs=1, val_check_interval=4).fit(model, loader(), loader(16))


def failing_cost(error: BaseException) -> Callable[[Tensor, Tensor], Tensor]:
    calls = []

    def cost(student: Tensor, teacher: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 5:
            raise error
        return torch.cdist(student, teacher)

    return cost


def raise_after(task: Task, error: BaseException) -> None:
    if task.place == "forward" and task.training and task.trainer.global_step == 2:
        raise error


class watched_views:
    """Weak references to all views and readings made inside the block."""

    def __enter__(self) -> list[Any]:
        self.made: list[Any] = []
        made, init = self.made, View.__init__

        def recorded(view: View, *args: Any, **kwargs: Any) -> None:
            init(view, *args, **kwargs)
            made.append(weakref.ref(view))

        self.init, View.__init__ = init, recorded
        return self.made

    def __exit__(self, *error: object) -> None:
        View.__init__ = self.init


class Alive(pl.Callback):
    """After each step: is any reading alive that was recorded in it?"""

    def __init__(self, transfer: Any) -> None:
        self.readings: list[Any] = []
        self.alive: list[int] = []
        self.count = 0
        loss = transfer.loss

        def noting(**options: Any) -> Tensor:
            for view in transfer.views:
                for side in (view.student, view.teacher):
                    self.readings += [weakref.ref(reading) for readings in side.values() for reading in readings]
            return loss(**options)

        transfer.loss = noting

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.count += len(self.readings)
        self.alive.append(sum(reading() is not None for reading in self.readings))
        self.readings = []


def test_readings_die_with_their_step():
    callback = make_callback(memory=0.9)
    alive = Alive(callback.transfer)
    fitted([callback, alive])
    assert alive.count == 4 * 4
    assert alive.alive == [0, 0, 0, 0]


# Logging


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


def test_logged_values_are_the_unweighted_term():
    callback, seen = make_callback(weight=3.0, layers=[["net.block1", "block1"], ["net.block2", "block2"]]), Seen()
    terms: list[tuple[float, list[float]]] = []
    loss = callback.transfer.loss

    def noting(**options: Any) -> Tensor:
        value = loss(**options)
        terms.append((float(value.detach()), [float(distance.value) for distance in callback.transfer.distances]))
        return value

    callback.transfer.loss = noting
    fitted([callback, seen])
    assert len(terms) == len(seen.values) == 4
    for (weighted, layers), values in zip(terms, seen.values, strict=True):
        assert values["train/otrt"] == pytest.approx(weighted / 3, rel=1e-6)
        assert values["train/otrt"] == pytest.approx(sum(layers) / 2, rel=1e-6)
        assert [values["otrt/net.block1"], values["otrt/net.block2"]] == layers
        assert values["otrt/weight"] == 3.0
    assert len({values["train/otrt"] for values in seen.values}) == 4
    assert seen.bar == ["train/otrt"]


class Unsized(Task):
    """A batch whose size cannot be guessed from the first tensor in it."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.loss([batch["inputs"][0], batch["inputs"][1]])

    def log(self, name: str, value: Any, *, batch_size: int | None = None, **options: Any) -> None:
        self.sizes.append(batch_size)
        super().log(name, value, batch_size=batch_size, **options)


def test_the_batch_size_is_that_of_the_forwards():
    def collate(samples: list[Any]) -> dict[str, Any]:
        x, y = torch.utils.data.default_collate(samples)
        return {"strange": torch.zeros(2, 3), "inputs": (x, y), "other": torch.zeros(5)}

    task = make_task(Unsized)
    task.sizes = []
    data = DataLoader(make_data(20), batch_size=8, collate_fn=collate)
    make_trainer(callbacks=[make_callback()], max_epochs=1).fit(task, data)
    assert task.sizes == [8] * 4 + [8] * 4 + [4] * 4


@pytest.mark.parametrize("layers", ["auto", LAYERS])
def test_two_callbacks_share_one_teacher(layers):
    """Each records its own run of the teacher, and its own forward of the student, also while the other traces."""
    teacher = make_teacher()
    first = make_callback(teacher, layers=layers, weight=1.0, cost="euclidean")
    second = make_callback(teacher, layers=layers, weight=1.0, cost="euclidean", student_root="net")
    both = fitted([first, second])
    expected = weights(fitted([make_callback(layers=layers, cost="euclidean", weight=2.0)]))
    for name, value in weights(both).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert not hooks(both, teacher)


def test_two_callbacks_add_up_and_log_under_names_of_their_own():
    first = make_callback(layers={"net.block1": "block1"}, weight=2.0)
    second = make_callback(layers={"net.block2": "block2"}, weight=1.0)
    seen = Seen()
    both = fitted([first, second, seen])
    assert set(seen.values[-1]) == {
        "train/otrt",
        "train/otrt-2",
        "otrt/weight",
        "otrt/weight-2",
        "otrt/net.block1",
        "otrt/net.block2-2",
    }
    assert seen.bar == ["train/otrt", "train/otrt-2"]
    one = OTRTCallback(
        make_teacher(),
        layers=[
            {"student": "net.block1", "teacher": "block1", "weight": 2.0},
            {"student": "net.block2", "teacher": "block2", "weight": 1.0},
        ],
        weight=3.0,
    )
    expected = weights(fitted([one]))
    for name, value in weights(both).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_a_callback_whose_root_lies_inside_that_of_another():
    """It traces its layers while the forward of the other is being recorded."""
    inner = torch.nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
    options = {"layers": {"net.block2": "1"}, "student_root": "net.block2", "weight": 1.0}
    first, second, seen = make_callback(), OTRTCallback(inner, **options), Seen()
    both = fitted([first, second, seen])
    alone = Seen()
    one = fitted([make_callback(), alone])
    assert seen.values[0]["train/otrt"] == alone.values[0]["train/otrt"]
    assert seen.values[0]["train/otrt-2"] > 0
    assert differ(weights(both), weights(one))


def test_teachers_of_one_architecture_on_the_same_layers():
    """Their states are told apart, in any order, and two callbacks alike are refused by Lightning."""
    teachers = [make_teacher(), make_teacher()]
    with torch.no_grad():
        teachers[1].head.bias.add_(1)
    keys = {make_callback(teacher).state_key for teacher in teachers}
    assert len(keys) == 2
    assert keys == {make_callback(teacher).state_key for teacher in (teachers[1], make_teacher())}
    task = fitted([make_callback(teacher) for teacher in teachers])
    assert differ(weights(task), weights(fitted([make_callback()])))
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fitted([make_callback(), make_callback(weight=1.0)])


def test_the_table_of_layers_is_logged_once(monkeypatch):
    callback = make_callback()
    lines: list[str] = []
    callback.transfer.report = lines.append
    fitted([callback], max_epochs=3)
    assert len(lines) == 1
    assert "from Net to Task" in lines[0]
    assert lines[0].count("net.block") == 2


def test_the_term_is_in_the_logged_loss_and_on_the_bar(tmp_path, capsys):
    """The loss that Lightning hands on is that of the task plus the weighted term."""

    class Losses(pl.Callback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            self.losses.append(float(outputs["loss"]))

    callback, losses, seen = make_callback(), Losses(), Seen()
    task = fitted([callback, losses, seen, TQDMProgressBar()], enable_progress_bar=True, max_steps=1)
    plain = make_task()
    expected = plain.loss(next(iter(loader()))).detach()
    assert losses.losses[0] == pytest.approx(float(expected) + 2 * seen.values[0]["train/otrt"], rel=1e-6)
    assert "train/otrt=" in capsys.readouterr().out
    assert task.trainer.global_step == 1


# Checkpoints and resuming


def resuming_trainer(path: Path, **options: Any) -> pl.Trainer:
    return make_trainer(default_root_dir=path, **options)


RESUMED = [
    {},
    {"memory": 0.9, "solve_every": 3},
    {"cost": "euclidean", "memory": 0.9, "solve_every": 5},
    {"plan": "static"},
    {"plan": "random", "seed": 3},
    {"plan": "exact", "solve_every": 7},
    {"schedule": LinearWarmup(12), "layers": "auto"},
    {"schedule": CosineDecay(12), "layers": "penultimate"},
]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize(
    ("options", "at", "way"),
    [
        *((options, "mid-epoch", "callback") for options in RESUMED),
        *((options, "epoch end", "callback") for options in RESUMED[:3]),
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


class Batches(Task):
    """Brings its own data, whose position Lightning restores in the middle of an epoch."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        # The batch by its index: a plain DataLoader starts from the beginning when an epoch is resumed in its middle.
        return super().training_step(list(loader())[batch_idx], batch_idx)


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
    [({"layers": "penultimate"}, "`layers` or the teacher"), ({"weight": 5.0, "epsilon": 0.02}, None)],
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


# Copies of a module that is being trained


class Copying(pl.Callback):
    """Copies the module in the middle of a fit, in every way."""

    def __init__(self) -> None:
        self.copies: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.copies or trainer.global_step < 2:
            return
        trainer_of, pl_module._trainer = pl_module._trainer, None
        try:
            self.copies = {
                "deepcopy": copy.deepcopy(pl_module),
                "pickle": pickle.loads(pickle.dumps(pl_module)),
                "submodule": copy.deepcopy(pl_module.net),
                "pickled submodule": pickle.loads(pickle.dumps(pl_module.net)),
                "saved": self.saved(pl_module),
            }
        finally:
            pl_module._trainer = trainer_of

    @staticmethod
    def saved(module: nn.Module) -> nn.Module:
        import io

        file = io.BytesIO()
        torch.save(module, file)
        assert len(file.getvalue()) < 60_000
        file.seek(0)
        return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", ["callback", "wrapper"])
def test_copies_in_mid_fit_are_plain(way):
    task, teacher, copying = make_task(), make_teacher(64), Copying()
    if way == "callback":
        model, callbacks = task, [make_callback(teacher), copying]
    else:
        model, callbacks = OTRTModule(task, teacher, layers=LAYERS, weight=2.0), [copying]
    undisturbed = make_task()
    make_trainer(callbacks=[make_callback(make_teacher(64))]).fit(undisturbed, loader())
    with forwards(teacher) as count:
        make_trainer(callbacks=callbacks).fit(model, loader())
        fitted_calls = len(count)
        assert_same(weights(task), weights(undisturbed))
        x, y = next(iter(loader()))
        for name, copied in copying.copies.items():
            assert type(copied) is (Net if "submodule" in name else Task), name
            assert differ({k.removeprefix("net."): v for k, v in weights(copied).items()}, weights(task.net))
            if isinstance(copied, Task):
                assert "teacher" not in repr(vars(copied))
                before = weights(task)
                copied.training_step([x, y], 0).backward()
                assert_same(weights(task), before)
                make_trainer().fit(copied, loader())
            else:
                copied(x).sum().backward()
        assert len(count) == fitted_calls, "a copy ran the teacher"


@needs_averaging
def test_a_moving_average_has_no_teacher_and_no_hook():
    teacher, task = make_teacher(), make_task(ValidatedTask)
    averaging = of_lightning.WeightAveraging(avg_fn=lambda average, value, count: 0.9 * average + 0.1 * value)
    kept: list[Any] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            kept.append(averaging._average_model)

    with forwards(teacher) as count:
        make_trainer(callbacks=[make_callback(teacher), averaging, Keep()], max_epochs=1).fit(
            task, loader(), loader(16)
        )
        calls = len(count)
        average = kept[-1].module
        assert not [name for name, part in average.named_modules() if part is teacher]
        average.net(next(iter(loader()))[0]).sum().backward()
        assert len(count) == calls
    assert sum(p.numel() for p in average.parameters()) == sum(p.numel() for p in task.parameters())

    by_wrapper = make_task(ValidatedTask)
    make_trainer(
        callbacks=[of_lightning.WeightAveraging(avg_fn=lambda average, value, count: 0.9 * average + 0.1 * value)],
        max_epochs=1,
    ).fit(OTRTModule(by_wrapper, make_teacher(), layers=LAYERS, weight=2.0), loader(), loader(16))
    assert_same(weights(by_wrapper), weights(task))
    plain = make_task(ValidatedTask)
    make_trainer(callbacks=[of_lightning.WeightAveraging(avg_fn=lambda a, v, n: 0.9 * a + 0.1 * v)], max_epochs=1).fit(
        plain, loader(), loader(16)
    )
    assert differ(weights(task), weights(plain))


# Finders, and several fits


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
    count = engine.pairs[0].sums[0]
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


def test_evaluation_alone_touches_nothing():
    callback, task = make_callback(), make_task(ValidatedTask)
    before = state_of(task)
    trainer = make_trainer(callbacks=[callback])
    trainer.validate(task, loader(16), verbose=False)
    trainer.test(task, loader(16), verbose=False)
    trainer.predict(task, DataLoader(make_data(8).tensors[0], batch_size=4))
    assert state_of(task)["bytes"] == before["bytes"]
    assert callback.transfer.engine is None


def test_a_training_step_of_the_instance_is_put_back():
    task = make_task()
    own = task.training_step
    task.training_step = lambda batch, batch_idx: own(batch, batch_idx)
    mine = task.training_step
    fitted([make_callback()], task=task)
    assert task.__dict__["training_step"] is mine


# Terms that would be missing without a word


class Silent(Task):
    """Manual steps in which something keeps the term away."""

    how = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if self.how == "forward":
            F.cross_entropy(self.net.head(self.net.forward(batch[0]) @ torch.ones(3, 8)), batch[1]).backward()
        elif self.how == "frozen":
            self.net.requires_grad_(False)
            self.net(batch[0])
            self.net.requires_grad_(True)
            self.manual_backward(self.net.head.weight.sum())
        else:
            self.loss(batch).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("bare", r"ended without `self\.manual_backward\(loss\)`"),
        ("forward", r"in 4 training steps no `self\.manual_backward\(loss\)` came after a forward"),
        ("frozen", r"in 4 training steps no `self\.manual_backward\(loss\)` came after a forward"),
    ],
)
def test_a_manual_step_without_term_is_an_error(how, words):
    task = make_task(Silent)
    task.how = how
    with pytest.raises(MisconfigurationException, match=words):
        fitted([make_callback()], task=task)
    assert not hooks(task)


class Elsewhere(Task):
    """Never calls the module that holds the layers."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(Net.forward(self.net, batch[0]), batch[1])


def test_a_root_that_is_not_called_is_an_error():
    task = make_task(Elsewhere)
    with pytest.raises(RuntimeError, match="student_root"):
        fitted([make_callback()], task=task)
    assert not hooks(task)


def test_a_frozen_student_is_an_error():
    task = make_task()
    task.net.block1.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"constant.*net\.block1"):
        fitted([make_callback(layers={"net.block1": "block1"})], task=task)


def test_not_strict_leaves_the_term_out_with_one_warning():
    task = make_task(Elsewhere)
    with pytest.warns(UserWarning, match="strict=False") as caught:
        fitted([make_callback(strict=False)], task=task)
    assert sum("strict=False" in str(warning.message) for warning in caught) == 1
    assert_same(weights(task), weights(fitted([], task=make_task(Elsewhere))))
