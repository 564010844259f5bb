"""A wrapped module is a module of the task's own class: nothing is nested, and nothing of the task changes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from helpers import (
    LAYERS,
    Task,
    ValidatedTask,
    assert_same,
    differ,
    hooks,
    loader,
    make_task,
    make_teacher,
    make_trainer,
    weights,
)
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from processes import run_processes
from torch import Tensor, nn

from lightning_otrt import OTRTCallback, OTRTModule, RepresentationTransfer

OPTIONS: dict[str, Any] = {"layers": LAYERS, "weight": 2.0}


def wrap(task: Any, **options: Any) -> Any:
    return OTRTModule(task, make_teacher(), **{**OPTIONS, **options})


def test_it_is_the_task():
    task = make_task(width=5)
    wrapped = wrap(task)
    assert isinstance(wrapped, Task)
    assert isinstance(wrapped, OTRTModule)
    assert not isinstance(task, OTRTModule)
    assert type(wrapped).__name__ == "Task"
    assert type(wrapped).__doc__ == Task.__doc__
    assert wrapped.net is task.net
    assert wrapped.hparams is task.hparams
    assert dict(wrapped.hparams) == {"width": 5, "lr": 0.1, "dropout": 0.0, "norm": True}
    assert list(wrapped.state_dict()) == list(task.state_dict())
    assert [name for name, _ in wrapped.named_parameters()] == [name for name, _ in task.named_parameters()]
    assert isinstance(wrapped.otrt, RepresentationTransfer)
    assert "otrt" not in repr(wrapped)
    wrapped.lr = 0.5
    wrapped.extra = nn.Linear(2, 2)
    assert task.lr == 0.5
    assert task.extra is wrapped.extra
    x = next(iter(loader()))[0]
    torch.testing.assert_close(wrapped.eval()(x), task(x), rtol=0, atol=0)
    assert not hooks(task)


def test_the_task_is_trained_and_plain_afterwards():
    task = make_task()
    make_trainer().fit(wrap(task), loader())
    after, plain = weights(task), make_task()
    make_trainer().fit(plain, loader())
    assert differ(after, weights(plain))
    # Fitted by itself, the task has no term any more.
    other = make_task()
    other.load_state_dict(after)
    make_trainer().fit(other, loader())
    make_trainer().fit(task, loader())
    assert_same(weights(task), weights(other))


class NotedWrapper(OTRTModule):
    """A wrapper of a user."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.noted = True


def test_a_subclass_of_the_wrapper():
    task = make_task()
    wrapped = NotedWrapper(task, make_teacher(), **OPTIONS)
    assert isinstance(wrapped, NotedWrapper)
    make_trainer().fit(wrapped, loader())
    assert task.noted
    other = make_task()
    make_trainer().fit(wrap(other), loader())
    assert_same(weights(task), weights(other))


FAMILY: list[type] = []


class Registered(Task):
    """The base of classes that are kept under a key."""

    def __init_subclass__(cls, *, key: str, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        FAMILY.append(cls)


class Member(Registered, key="member"):
    pass


def test_the_class_of_a_wrapped_task_is_not_registered():
    """It is no class that the user wrote, and has none of the keywords that such a class needs."""
    task = Member()
    wrapped = wrap(task)
    assert isinstance(wrapped, Member)
    assert [Member] == FAMILY
    make_trainer(max_steps=1).fit(wrapped, loader())


def test_copies_and_pickles_are_plain():
    wrapped = wrap(make_task())
    for copied in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert type(copied) is Task
        assert_same(weights(copied), weights(wrapped))


def test_a_fit_of_a_deep_copy_says_that_it_has_no_teacher():
    copied = copy.deepcopy(wrap(make_task()))
    with pytest.warns(UserWarning, match="is a deep copy of one that OTRTModule wrapped"):
        make_trainer().fit(copied, loader())
    plain = make_task()
    make_trainer().fit(plain, loader())
    assert_same(weights(copied), weights(plain))


@pytest.mark.parametrize("again", [wrap, lambda task: task])
def test_a_deep_copy_that_has_a_teacher_again(again):
    copied, callbacks = again(copy.deepcopy(wrap(make_task()))), []
    if not isinstance(copied, OTRTModule):
        callbacks = [OTRTCallback(make_teacher(), **OPTIONS)]
    make_trainer(callbacks=callbacks).fit(copied, loader())
    expected = make_task()
    make_trainer().fit(wrap(expected), loader())
    assert_same(weights(copied), weights(expected))
    assert type(pickle.loads(pickle.dumps(copied))) is Task


@pytest.mark.slow
def test_a_pickle_for_a_new_process_is_wrapped():
    """As `ddp_spawn` makes it: there the module goes on training."""
    wrapped = wrap(make_task())
    process = torch.multiprocessing.get_context("spawn").Process(target=print_kind, args=(wrapped,))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def print_kind(received: Any) -> None:
    assert isinstance(received, OTRTModule), type(received)
    assert isinstance(received, Task)
    assert received.otrt.weight == 2.0


class WithCallbacks(Task):
    """Brings callbacks of its own."""

    one = False

    def configure_callbacks(self) -> Any:
        own = Counting()
        return own if self.one else [own]


class Counting(pl.Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1


@pytest.mark.parametrize("one", [True, False])
def test_callbacks_of_the_task_are_kept(one):
    task = make_task(WithCallbacks)
    task.one = one
    trainer = make_trainer()
    trainer.fit(wrap(task), loader())
    (counting,) = [callback for callback in trainer.callbacks if isinstance(callback, Counting)]
    assert counting.steps == 4
    assert differ(weights(task), fitted_plain(WithCallbacks))


def fitted_plain(kind: type[Task] = Task) -> dict[str, Tensor]:
    task = make_task(kind)
    make_trainer().fit(task, loader())
    return weights(task)


def test_wrapper_and_callback_add_up():
    """A model callback replaces a trainer callback of its class, silently, were the two of one class."""
    task = make_task()
    trainer = make_trainer(callbacks=[OTRTCallback(make_teacher(), layers={"net.block1": "block1"}, weight=1.0)])
    trainer.fit(wrap(task, layers={"net.block2": "block2"}, weight=1.0), loader())
    assert {"train/otrt", "train/otrt-2"} <= set(trainer.callback_metrics)
    both = make_task()
    make_trainer(callbacks=[OTRTCallback(make_teacher(), **OPTIONS)]).fit(both, loader())
    for name, value in weights(both).items():
        torch.testing.assert_close(weights(task)[name], value, rtol=1e-5, atol=1e-6)


def test_checkpoints_tests_and_predictions(tmp_path: Path):
    task = make_task(ValidatedTask)
    wrapped = wrap(task)
    saver = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = make_trainer(callbacks=[saver], max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(wrapped, loader(), loader(16))
    (found,) = trainer.test(wrapped, loader(16), ckpt_path="best", weights_only=True)
    assert found["test_loss"] == pytest.approx(float(saver.best_model_score), rel=1e-6)
    checkpoint = torch.load(saver.best_model_path, weights_only=True)
    assert list(checkpoint["state_dict"]) == list(make_task().state_dict())
    for kind in (ValidatedTask, type(wrapped)):
        loaded = kind.load_from_checkpoint(saver.best_model_path)
        assert_same(weights(loaded), weights(task))
        assert isinstance(loaded, ValidatedTask)
    assert type(ValidatedTask.load_from_checkpoint(saver.best_model_path)) is ValidatedTask


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_learning_rate_finder_tunes_the_task(tmp_path: Path):
    losses = {}
    for name in ("wrapped", "plain"):
        task = make_task()
        trainer = make_trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=True)
        finder = Tuner(trainer).lr_find(
            wrap(task, weight=20.0) if name == "wrapped" else task, loader(), num_training=8
        )
        losses[name] = finder.results["loss"][0]
    assert losses["wrapped"] > losses["plain"] + 1


def test_what_cannot_be_wrapped():
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        pass

    with pytest.raises(MisconfigurationException, match="wrapped by OTRTModule already"):
        wrap(wrap(make_task()))
    with pytest.raises(TypeError, match=r"`lightning` package, but .*Other is one of `pytorch_lightning`"):
        wrap(Other())
    with pytest.raises(TypeError, match="got a compiled one"):
        wrap(torch.compile(make_task(), backend="eager"))
    with pytest.raises(TypeError, match="Expected `task` to be a LightningModule, but got Linear"):
        wrap(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="unexpected keyword argument 'wieght'"):
        wrap(make_task(), wieght=1.0)


def test_one_teacher_for_two_wrapped_tasks():
    teacher, first, second = make_teacher(), make_task(), make_task()
    make_trainer().fit(OTRTModule(first, teacher, **OPTIONS), loader())
    make_trainer().fit(OTRTModule(second, teacher, **OPTIONS), loader())
    assert_same(weights(first), weights(second))
    assert not hooks(first, second, teacher)


class Calling(Task):
    """Calls itself, whose forward Lightning redirects under DDP."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def fit_on_a_rank(way: str, kind: type[Task], layers: Any) -> dict[str, Any]:
    task = make_task(kind, norm=False)
    noted = Noting()
    callbacks: list[Any] = [noted]
    if way == "callback":
        callbacks.append(OTRTCallback(make_teacher(), layers=layers, weight=2.0))
    model = wrap(task, layers=layers) if way == "wrapper" else task
    make_trainer(strategy="ddp", devices=2, callbacks=callbacks).fit(model, loader())
    return {"weights": weights(task), "terms": noted.terms, "processes": noted.processes, "hooks": hooks(task)}


class Noting(pl.Callback):
    def __init__(self) -> None:
        self.terms: list[float] = []
        self.processes = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.processes = dist.get_world_size()
        if "train/otrt" in trainer.callback_metrics:
            self.terms.append(float(trainer.callback_metrics["train/otrt"]))


@pytest.mark.parametrize(
    ("way", "kind", "layers"),
    [("callback", Task, LAYERS), ("callback", Calling, "auto"), ("wrapper", Calling, "penultimate")],
)
def test_two_processes(way: str, kind: type[Task], layers: Any):
    """Hooks fire on each rank, no parameter is unused, and the ranks stay identical."""
    first, second = run_processes(2, fit_on_a_rank, way, kind, layers, init=False, timeout=150)
    assert first["processes"] == second["processes"] == 2
    assert len(first["terms"]) == len(second["terms"]) == 4
    assert_same(first["weights"], second["weights"])
    assert not first["hooks"]
    plain, _ = run_processes(2, fit_on_a_rank, "plain", kind, layers, init=False, timeout=150)
    assert not plain["terms"]
    assert differ(first["weights"], plain["weights"])


def test_monitors_of_lightning_work(tmp_path: Path):
    task = make_task()
    trainer = make_trainer(logger=pl.loggers.CSVLogger(tmp_path), callbacks=[LearningRateMonitor()])
    trainer.fit(wrap(task), loader())
    trainer.logger.save()
    (metrics,) = tmp_path.rglob("metrics.csv")
    header = metrics.read_text().splitlines()[0].split(",")
    assert {"train/otrt", "otrt/weight", "otrt/distance/net.block1", "otrt/distance/net.block2"} <= set(header)
