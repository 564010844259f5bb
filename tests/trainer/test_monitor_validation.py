"""Distances that the monitor measures over validation sets."""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    LAYERS,
    Task,
    ValidatedTask,
    assert_same,
    forwards,
    loader,
    make_task,
    make_teacher,
    weights,
)
from lightning.pytorch.loggers import CSVLogger
from processes import run_processes
from trainer.monitored import column, fit, read

from lightning_otrt import NeuronTransportDistance, OTRTCallback, OTRTModule
from lightning_otrt.trainer.monitor import OTRTMonitor


class BreaksOnOne(ValidatedTask):
    """The second process sees a bad batch."""

    def validation_step(self, batch, batch_idx):
        is_bad = batch_idx == 1 and self.global_rank == 1
        self.net(torch.full_like(batch[0], float("nan")) if is_bad else batch[0])


def fit_that_breaks_on_one() -> tuple[list[str], list[str]]:
    """What a process says and logs."""
    options = {"strategy": "ddp", "devices": 2, "max_epochs": 1, "validation": loader(48)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task, callback = make_task(BreaksOnOne), OTRTCallback(make_teacher(), LAYERS)
        trainer = fit(task, callback, OTRTMonitor(99, figures=False), **options)
    return [str(each.message) for each in caught], list(trainer.callback_metrics)


class TestValidation:
    def test_is_exact_over_the_set(self):
        task, teacher = make_task(ValidatedTask), make_teacher()
        data = loader(60, 7)
        trainer = fit(
            task, OTRTCallback(teacher, LAYERS), OTRTMonitor(99, figures=False), validation=data, max_epochs=2
        )
        task.eval(), teacher.eval()
        x = torch.cat([batch[0] for batch in data])
        for name, width in (("block1", (4, 6)), ("block2", (8, 12))):
            metric = NeuronTransportDistance(*width)
            metric.update(*(read(net, name, x) for net in (task.net, teacher)))
            assert trainer.callback_metrics[f"val/otrt/net.{name}"] == pytest.approx(float(metric.compute()), abs=1e-4)

    def test_can_be_monitored(self, tmp_path):
        checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val/otrt/net.block2")
        fit(
            make_task(ValidatedTask),
            OTRTCallback(make_teacher(), LAYERS),
            OTRTMonitor(99, figures=False),
            checkpoint,
            validation=loader(16),
            max_epochs=2,
            enable_checkpointing=True,
        )
        assert checkpoint.best_model_score is not None

    def test_every_other_epoch(self, tmp_path):
        logger = CSVLogger(tmp_path)
        monitor = OTRTMonitor(99, every_n_epochs=2, figures=False)
        task, callback = make_task(ValidatedTask), OTRTCallback(make_teacher(), LAYERS)
        fit(task, callback, monitor, validation=loader(16), max_epochs=4, logger=logger)
        assert list(column(logger, "val/otrt/net.block1")) == [15, 31]

    def test_the_teacher_rests_where_it_is_not_wanted(self):
        teacher = make_teacher()
        runs = []
        with teacher.register_forward_hook(lambda *args: runs.append(1)):
            for validation in (False, True):
                monitor = OTRTMonitor(99, validation=validation, figures=False)
                task = make_task(ValidatedTask)
                fit(task, OTRTCallback(teacher, LAYERS), monitor, validation=loader(16), max_epochs=1)
        assert len(runs) == 8 + 8 + 2, "the traces leave no sign"

    def test_what_goes_wrong_does_not_end_the_fit(self):
        class Widens(ValidatedTask):
            def validation_step(self, batch, batch_idx):
                self.net(torch.full_like(batch[0], float("nan")))

        with pytest.warns(UserWarning, match="stopped measuring distances in validation.*NaN"):
            trainer = fit(
                Widens(),
                OTRTCallback(make_teacher(), LAYERS),
                OTRTMonitor(99, figures=False),
                validation=loader(16),
                max_epochs=2,
            )
        assert trainer.state.finished
        assert "val/otrt/net.block1" not in trainer.callback_metrics

    def test_a_part_of_the_data_is_not_taken_for_all(self):
        class Breaks(ValidatedTask):
            def validation_step(self, batch, batch_idx):
                self.net(torch.full_like(batch[0], float("nan")) if batch_idx == 1 else batch[0])

        with pytest.warns(UserWarning, match="stopped measuring distances in validation, and logs none.*NaN"):
            trainer = fit(
                Breaks(),
                OTRTCallback(make_teacher(), LAYERS),
                OTRTMonitor(99, figures=False),
                validation=loader(48),
                max_epochs=1,
            )
        assert not [name for name in trainer.callback_metrics if name.startswith("val/otrt")]

    def test_nor_that_of_some_processes(self):
        said, metrics = zip(*run_processes(2, fit_that_breaks_on_one, init=False, timeout=150), strict=True)
        assert [any("stopped measuring" in each for each in messages) for messages in said] == [False, True]
        assert not any(name.startswith("val/otrt") for names in metrics for name in names)

    def test_a_plan_that_is_not_found_does_not_end_the_fit(self, monkeypatch):
        solve, failed = NeuronTransportDistance._solve, []

        def fail(self, matrix):
            if not failed:
                failed.append(matrix)
                raise RuntimeError("did not converge")
            return solve(self, matrix)

        monkeypatch.setattr(NeuronTransportDistance, "_solve", fail)
        with pytest.warns(UserWarning, match="lacks a distance in validation.*did not converge"):
            trainer = fit(
                make_task(ValidatedTask),
                OTRTCallback(make_teacher(), LAYERS),
                OTRTMonitor(99, figures=False),
                validation=loader(16),
                max_epochs=1,
            )
        names = [name for name in trainer.callback_metrics if name.startswith("val/otrt")]
        assert len(names) == len(LAYERS) - 1

    def test_a_cost_that_is_no_sum(self):
        callback = OTRTCallback(make_teacher(), LAYERS, cost=lambda y, x: torch.cdist(y, x))
        with pytest.warns(UserWarning, match="no distances in validation, because a cost that is a function"):
            fit(make_task(ValidatedTask), callback, OTRTMonitor(99, figures=False), validation=loader(8), max_epochs=1)

    def test_a_validation_that_does_not_call_the_student(self):
        class Idle(ValidatedTask):
            def validation_step(self, batch, batch_idx):
                return None

        with pytest.warns(UserWarning, match="no distances of validation, because it saw no forward of 'net'"):
            trainer = fit(
                Idle(),
                OTRTCallback(make_teacher(), LAYERS),
                OTRTMonitor(99, figures=False),
                validation=loader(8),
                max_epochs=1,
            )
        assert "val/otrt/net.block1" not in trainer.callback_metrics


class TestWithoutATerm:
    """A plain baseline has the same curve, and is as plain as without the monitor."""

    def fit(self, task, callback, **options):
        return fit(task, callback, OTRTMonitor(1, figures=False), validation=loader(60, 7), **options)

    @pytest.mark.parametrize("layers", [LAYERS, "auto"])
    @pytest.mark.parametrize("plan", ["sinkhorn", "orthogonal", "auto"])
    def test_the_distances_are_those_of_the_network_that_was_trained(self, layers, plan):
        task, teacher = make_task(ValidatedTask), make_teacher()
        callback = OTRTCallback(teacher, layers, plan=plan, weight=0.0)
        metrics = self.fit(task, callback, max_epochs=2).callback_metrics
        task.eval(), teacher.eval()
        x = torch.cat([batch[0] for batch in loader(60, 7)])
        kinds = callback.transfer.engine.plans
        assert len(callback.transfer.pairs) == len(kinds) >= 2
        for pair, label, kind in zip(callback.transfer.pairs, callback.transfer.labels, kinds, strict=True):
            y, t = read(task.net, pair.student.removeprefix("net."), x), read(teacher, pair.teacher, x)
            metric = NeuronTransportDistance(len(y), len(t), plan=kind)
            metric.update(y, t)
            assert metrics[f"val/otrt/{label}"] == pytest.approx(float(metric.compute()), abs=1e-4)
        assert metrics["otrt/weight"] == 0
        assert not [name for name in metrics if "train/otrt" in name or "distance" in name or "share" in name]

    def test_training_is_as_without_the_plugin(self):
        found = []
        for callbacks in ([], [OTRTCallback(make_teacher(), weight=0.0), OTRTMonitor(1, figures=False)]):
            task = make_task(ValidatedTask, dropout=0.5)
            torch.manual_seed(7)
            fit(task, *callbacks, validation=loader(60, 7), max_epochs=2)
            found.append((weights(task), torch.get_rng_state()))
        assert_same(found[1][0], found[0][0])
        assert torch.equal(found[1][1], found[0][1])

    def test_the_teacher_runs_in_the_first_step_and_in_validation(self):
        teacher = make_teacher()
        with forwards(teacher) as count:
            self.fit(make_task(ValidatedTask), OTRTCallback(teacher, LAYERS, weight=0.0), max_epochs=2)
        assert len(count) == 4 + 2 * len(loader(60, 7)), (
            "one traced forward, two to see how maps lie, one beside the student"
        )

    @pytest.mark.parametrize("extra", [{"validation": False}, {}])
    def test_nothing_runs_where_there_is_no_validation_to_measure(self, extra):
        teacher = make_teacher()
        data = loader(60, 7) if extra else None
        kind = ValidatedTask if extra else Task
        with forwards(teacher) as count:
            monitor = OTRTMonitor(1, figures=False, **extra)
            fit(make_task(kind), OTRTCallback(teacher, LAYERS, weight=0.0), monitor, validation=data, max_epochs=1)
        assert not count

    def test_a_weight_that_rises_later(self, tmp_path):
        logger = CSVLogger(tmp_path)
        callback = OTRTCallback(make_teacher(), LAYERS, schedule=lambda step: float(step >= 8))
        self.fit(make_task(ValidatedTask), callback, max_epochs=2, logger=logger)
        assert list(column(logger, "val/otrt/net.block1")) == [7, 15]
        assert min(column(logger, "otrt/distance/net.block1")) >= 8

    def test_distillation_alone(self):
        callback = OTRTCallback(make_teacher(), LAYERS, weight=0.0, distillation=1.0)
        metrics = self.fit(make_task(ValidatedTask), callback, max_epochs=1).callback_metrics
        assert metrics["val/otrt/net.block1"] > 0
        assert "train/otrt" not in metrics

    def test_manual_optimization(self):
        class Manual(ValidatedTask):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        metrics = self.fit(
            make_task(Manual), OTRTCallback(make_teacher(), LAYERS, weight=0.0), max_epochs=1
        ).callback_metrics
        assert metrics["val/otrt/net.block1"] > 0

    def test_a_wrapped_module(self):
        wrapped = OTRTModule(make_task(ValidatedTask), make_teacher(), LAYERS, weight=0.0)
        trainer = fit(wrapped, OTRTMonitor(1, figures=False), validation=loader(60, 7), max_epochs=1)
        assert trainer.callback_metrics["val/otrt/net.block1"] > 0
