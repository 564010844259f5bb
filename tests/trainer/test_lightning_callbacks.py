"""The demo modules of Lightning, with each of its callbacks: the loss is the one written by hand, and nothing is left.

A fit with the callback ends with the weights of a fit whose ``training_step`` (or ``manual_backward``) adds the public
distance by hand, and what Lightning's callback found or did is the same. The two use different operations, so both
train in float64, where rounding is far below what any mistake would change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    assert_agree,
    assert_same,
    hooks,
    make_trainer,
    needs_averaging,
    seeded,
    weights,
)
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from trainer.demos import BATCHES, DEMOS, Case, Fed

from lightning_otrt import OTRTCallback, neurons, transport_distance

WEIGHT = 2.0


class ByHand:
    """The term as a user would write it, with hooks of their own and the public function."""

    def __init__(self, case: Case, module: pl.LightningModule, teacher: nn.Module) -> None:
        self.case, self.module, self.teacher = case, module, teacher.eval().double()
        self.seen: dict[str, Tensor] = {}
        module.get_submodule(case.root).register_forward_pre_hook(self.run_teacher)
        module.get_submodule(case.student).register_forward_hook(partial(self.keep, "student"))
        teacher.get_submodule(case.teacher).register_forward_hook(partial(self.keep, "teacher"))
        if module.automatic_optimization:
            self.step, module.training_step = module.training_step, self.training_step
        else:
            self.backward, module.manual_backward = module.manual_backward, self.manual_backward

    def __deepcopy__(self, memo: Any) -> ByHand:
        return self  # averages of the weights copy the module with its hooks

    def run_teacher(self, module: nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.teacher(*inputs)

    def keep(self, side: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if side == "teacher" or torch.is_grad_enabled():
            tensor = output if isinstance(output, Tensor) else output[0]
            self.seen[side] = neurons(tensor, neuron_axis=self.case.axis)

    def term(self) -> Tensor:
        return WEIGHT * transport_distance(self.seen["student"], self.seen["teacher"], plan="exact").value

    def training_step(self, *args: Any) -> Any:
        output = self.step(*args)
        if isinstance(output, Tensor):
            return output + self.term()
        return {**output, "loss": output["loss"] + self.term()}

    def manual_backward(self, loss: Tensor) -> None:
        self.backward(loss + self.term())


class Steps(pl.Callback):
    """Counts the steps whose term was logged, all but those of finders."""

    def __init__(self) -> None:
        self.steps = self.terms = 0

    def on_train_start(self, *args: Any) -> None:
        self.steps = self.terms = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps += 1
        self.terms += float(trainer.callback_metrics.get("train/otrt", -1.0)) > 0


class Norm(pl.Callback):
    """A number that depends on the training, and exists without the term, too."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.log("norm", sum(parameter.detach().norm() for parameter in pl_module.parameters()))


Finding = Any


@dataclass(frozen=True)
class Callback:
    """A callback of Lightning, and what it must have done, to be compared with the fit by hand."""

    make: Callable[[Case, pl.LightningModule, Path], Any]
    look: Callable[[pl.Trainer, Any, Case], Finding]
    options: Callable[[Path], dict[str, Any]] = lambda path: {}
    #: What Lightning says to a module with manual optimization.
    refuses_manual: str | None = None
    #: Whether what it finds depends on the loss, so that a fit without the term finds something else.
    depends: bool = False
    backbone: bool = False


def saved(trainer: pl.Trainer, saver: Any, case: Case) -> Finding:
    checkpoint = torch.load(saver.best_model_path, weights_only=True)
    assert list(checkpoint["state_dict"]) == list(case.build().state_dict())
    assert_same(checkpoint["state_dict"], weights(trainer.lightning_module))
    return checkpoint["global_step"]


def stopped(trainer: pl.Trainer, stopper: Any, case: Case) -> Finding:
    assert trainer.current_epoch == 2
    return stopper.stopped_epoch, stopper.best_score


def averaged(trainer: pl.Trainer, average: Any, case: Case) -> Finding:
    return copied(trainer, average._average_model.module)


def copied(trainer: pl.Trainer, average: nn.Module) -> Finding:
    """The weights of an average, which are those of the module in the end."""
    found = {name: value.detach().clone() for name, value in average.named_parameters()}
    assert_same({name: weights(trainer.lightning_module)[name] for name in found}, found)
    return [value.tolist() for value in found.values()]


def swapped(trainer: pl.Trainer, swa: Any, case: Case) -> Finding:
    assert int(swa.n_averaged) == 2
    average = swa._average_model
    if swa._model_contains_batch_norm:  # whose epoch more goes on with the momentum of the optimizer
        return [value.tolist() for value in average.parameters()]
    return copied(trainer, average)


def batch_size(trainer: pl.Trainer, finder: Any, case: Case) -> Finding:
    assert finder.optimal_batch_size == trainer.lightning_module.batch_size == 16
    return finder.optimal_batch_size


def learning_rate(trainer: pl.Trainer, finder: Any, case: Case) -> Finding:
    assert len(finder.optimal_lr.results["loss"]) > 5
    return finder.optimal_lr.results["loss"]


def pruned(trainer: pl.Trainer, pruning: Any, case: Case) -> Finding:
    weight = trainer.lightning_module.get_submodule(case.prunable).weight
    zeros = int((weight == 0).sum())
    assert abs(zeros - weight.numel() / 2) <= 1
    return zeros


def unfrozen(trainer: pl.Trainer, tuning: Any, case: Case) -> Finding:
    groups = trainer.optimizers[0].param_groups
    assert len(groups) == 2
    assert all(parameter.requires_grad for parameter in trainer.lightning_module.backbone.parameters())
    return [group["lr"] for group in groups]


def accumulated(trainer: pl.Trainer, scheduler: Any, case: Case) -> Finding:
    assert trainer.global_step == BATCHES // 2 + BATCHES // 4 * 2
    return trainer.global_step


def shown(trainer: pl.Trainer, bar: Any, case: Case) -> Finding:
    assert bar.progress is not None
    return trainer.global_step


def timed(trainer: pl.Trainer, timer: Any, case: Case) -> Finding:
    assert timer.time_elapsed("train") > 0
    return trainer.global_step


def measured(trainer: pl.Trainer, monitor: Any, case: Case) -> Finding:
    logged = Path(trainer.logger.log_dir, "metrics.csv").read_text()
    assert "train/device/samples_per_sec" in logged
    return trainer.global_step


def size_of(batch: Any) -> int:
    return len(batch) if isinstance(batch, Tensor) else len(batch[0])


CALLBACKS = {
    "ModelCheckpoint": Callback(
        lambda case, module, path: of_lightning.ModelCheckpoint(path, save_weights_only=False), saved
    ),
    "EarlyStopping": Callback(
        lambda case, module, path: of_lightning.EarlyStopping("norm", patience=1, min_delta=1e9),
        stopped,
        depends=True,
    ),
    "WeightAveraging": Callback(lambda case, module, path: of_lightning.WeightAveraging(), averaged, depends=True),
    "StochasticWeightAveraging": Callback(
        lambda case, module, path: of_lightning.StochasticWeightAveraging(0.05, swa_epoch_start=2),
        swapped,
        depends=True,
    ),
    "BatchSizeFinder": Callback(
        lambda case, module, path: of_lightning.BatchSizeFinder("power", steps_per_trial=1, init_val=8, max_trials=2),
        batch_size,
    ),
    "LearningRateFinder": Callback(
        lambda case, module, path: of_lightning.LearningRateFinder(
            1e-4, 1e-2, num_training_steps=8, update_attr=False, early_stop_threshold=None
        ),
        learning_rate,
        depends=True,
    ),
    "ModelPruning": Callback(
        lambda case, module, path: of_lightning.ModelPruning(
            "l1_unstructured",
            parameters_to_prune=[(module.get_submodule(case.prunable), "weight")],
            apply_pruning=lambda epoch: epoch == 0,
            use_lottery_ticket_hypothesis=False,
            amount=0.5,
        ),
        pruned,
    ),
    "BackboneFinetuning": Callback(
        lambda case, module, path: of_lightning.BackboneFinetuning(1, backbone_initial_lr=0.01), unfrozen, backbone=True
    ),
    "GradientAccumulationScheduler": Callback(
        lambda case, module, path: of_lightning.GradientAccumulationScheduler({0: 2, 1: 4}),
        accumulated,
        refuses_manual="Automatic gradient accumulation",
    ),
    "RichProgressBar": Callback(
        lambda case, module, path: of_lightning.RichProgressBar(), shown, lambda path: {"enable_progress_bar": True}
    ),
    "Timer": Callback(lambda case, module, path: of_lightning.Timer(interval="step"), timed),
    "ThroughputMonitor": Callback(
        lambda case, module, path: of_lightning.ThroughputMonitor(size_of, window_size=3),
        measured,
        lambda path: {"logger": CSVLogger(path)},
    ),
}


@dataclass
class Fit:
    """What came out of a fit."""

    module: Fed
    teacher: nn.Module
    finding: Finding
    steps: Steps
    refused: str = ""


def fit(case: Case, tool: Callback, path: Path, way: str) -> Fit:
    build = case.in_parts if tool.backbone and case.in_parts else case.build
    # Before the fit, because averages of the weights keep the type that they start with.
    module, teacher = seeded(0, build).double(), seeded(1, case.network)
    if tool.backbone:
        leave_out_frozen(module)
    steps, callback = Steps(), tool.make(case, module, path)
    callbacks = [Norm(), callback, steps]
    if way == "by hand":
        ByHand(case, module, teacher)
    if way == "callback":
        options = {
            "weight": WEIGHT,
            "plan": "exact",
            "memory": 0,
            "solve_every": 1,
            "teacher_inputs": case.teacher_inputs,
        }
        added = OTRTCallback(teacher, [case.pair], **options)
        callbacks.insert(0, added)
    options = {"max_epochs": 3, "limit_val_batches": 0, "default_root_dir": path, **tool.options(path)}
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=True, precision="64-true", **options)
    torch.manual_seed(7)
    try:
        trainer.fit(module)
    except (MisconfigurationException, RuntimeError) as error:
        if module.automatic_optimization or tool.refuses_manual is None:
            raise
        return Fit(module, teacher, None, steps, str(error))
    return Fit(module, teacher, tool.look(trainer, callback, case), steps)


def leave_out_frozen(module: pl.LightningModule) -> None:
    """As finetuning asks for; the optimizers of the demos hold all parameters."""
    configure = module.configure_optimizers

    def configure_optimizers() -> Any:
        found = configure()
        for group in (found[0][0] if isinstance(found, tuple) else found).param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        return found

    module.configure_optimizers = configure_optimizers


QUICK = [("boring", name) for name in CALLBACKS] + [
    (name, "ModelCheckpoint") for name in DEMOS if name not in ("boring", "images")
]


def marks_of(demo: str, name: str) -> list[pytest.MarkDecorator]:
    slow = [] if (demo, name) in QUICK else [pytest.mark.slow]
    return [*slow, needs_averaging] if name == "WeightAveraging" else slow


TABLE = [
    pytest.param(demo, name, marks=marks_of(demo, name), id=f"{demo}-{name}") for demo in DEMOS for name in CALLBACKS
]


@pytest.mark.parametrize(("demo", "name"), TABLE)
def test_every_demo_with_every_callback(demo: str, name: str, tmp_path: Path) -> None:
    case, tool = DEMOS[demo], CALLBACKS[name]
    expected, plain = (fit(case, tool, tmp_path / way, way) for way in ("by hand", "plain"))
    found = fit(case, tool, tmp_path / "callback", "callback")
    refuses = demo == "manual" and tool.refuses_manual is not None
    assert bool(found.refused) == bool(expected.refused) == refuses, (found.refused, expected.refused)
    assert found.refused == expected.refused
    assert not hooks(found.module, found.teacher)
    assert not {"training_step", "manual_backward"} & found.module.__dict__.keys()
    if refuses:
        assert tool.refuses_manual in found.refused
        return
    assert found.steps.terms == found.steps.steps > 0
    assert_agree(*(weights(one.module) for one in (found, expected, plain)))
    torch.testing.assert_close(found.finding, expected.finding, rtol=1e-9, atol=1e-9)
    if tool.depends:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found.finding, plain.finding, rtol=1e-6, atol=1e-6)
