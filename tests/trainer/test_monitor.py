"""What the monitor logs, draws and warns of, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import csv
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib as mpl
import pytest
import torch
from helpers import (
    LAYERS,
    Net,
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
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from processes import run_processes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_otrt import LinearWarmup, NeuronTransportDistance, OTRTCallback, OTRTModule
from lightning_otrt.reading.neurons import neurons
from lightning_otrt.trainer.monitor import OTRTMonitor

mpl.use("Agg")


def fit(task, *callbacks, data=None, validation=None, **options):
    trainer = make_trainer(callbacks=list(callbacks), **options)
    trainer.fit(task, loader() if data is None else data, validation)
    return trainer


def repeated(count: int) -> DataLoader:
    """The same batch several times."""
    x, y = next(iter(loader(batch_size=32)))
    return DataLoader(TensorDataset(x.repeat(count, 1, 1, 1), y.repeat(count)), batch_size=32)


def rows(logger) -> list[dict[str, str]]:
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return list(csv.DictReader(file))


def column(logger, name) -> dict[int, float]:
    return {int(row["step"]): float(row[name]) for row in rows(logger) if row.get(name)}


class TestTraining:
    def test_what_is_logged(self, tmp_path):
        logger = CSVLogger(tmp_path)
        fit(
            make_task(), OTRTCallback(make_teacher(), LAYERS), OTRTMonitor(2, figures=False), logger=logger, max_steps=6
        )
        for layer in LAYERS:
            for name in ("otrt/distance/", "otrt/marginal_error/", "otrt/entropy/", "otrt/layer_share/"):
                values = column(logger, f"{name}{layer}")
                assert list(values) == [1, 3, 5]
                assert all(0 < value < 1 for value in values.values())
        assert list(column(logger, "otrt/gradient_share")) == [1, 3, 5]
        assert not any("off_identity" in name for name in rows(logger)[0])
        # The same distance as the callback logs for the same step.
        assert column(logger, "otrt/distance/net.block1")[3] == pytest.approx(column(logger, "otrt/net.block1")[3])

    def test_interval_of_the_trainer(self, tmp_path):
        logger = CSVLogger(tmp_path)
        monitor = OTRTMonitor(figures=False)
        fit(make_task(), OTRTCallback(make_teacher(), LAYERS), monitor, logger=logger, max_steps=6, log_every_n_steps=3)
        assert list(column(logger, "otrt/entropy/net.block1")) == [2, 5]

    def test_off_identity_of_equal_widths(self, tmp_path):
        logger = CSVLogger(tmp_path)
        fit(make_task(), OTRTCallback(make_teacher(4), LAYERS), OTRTMonitor(1, figures=False), logger=logger)
        assert 0 < column(logger, "otrt/off_identity/net.block1")[2] <= 1

    def test_share_is_that_of_gradients_by_hand(self):
        task, teacher = make_task(lr=0.0), make_teacher()
        callback = OTRTCallback(teacher, {"net.block2": "block2"}, weight=4.0, solve_every=1)
        data = repeated(2)
        trainer = fit(task, callback, OTRTMonitor(2, figures=False), data=data, max_steps=2)
        share = trainer.callback_metrics["otrt/gradient_share"].item()
        outputs = []
        hook = task.net.block2.register_forward_hook(lambda module, args, output: outputs.append(output))
        with hook, callback.transfer.attached(task):
            loss = task.loss(next(iter(data)))
            term = callback.transfer.loss()
        norms = [torch.autograd.grad(part, outputs[-1], retain_graph=True)[0].norm() for part in (loss, term)]
        assert share == pytest.approx(float(norms[1] / (norms[0] + norms[1])), rel=1e-2)

    @pytest.mark.parametrize("options", [{"accumulate_grad_batches": 4}, {"precision": "bf16-mixed"}])
    def test_share_does_not_see_how_the_loss_is_scaled(self, options):
        shares = []
        for extra in ({}, options):
            task = make_task(lr=0.0)
            callback = OTRTCallback(make_teacher(), LAYERS)
            data = repeated(4)
            trainer = fit(task, callback, OTRTMonitor(4, figures=False), data=data, max_epochs=1, **extra)
            shares.append(trainer.callback_metrics["otrt/gradient_share"].item())
        assert shares[1] == pytest.approx(shares[0], rel=0.05)

    def test_training_is_the_same_with_it(self):
        tasks = [make_task(dropout=0.3) for _ in range(2)]
        for task, extra in zip(tasks, ([], [OTRTMonitor(1, figures=False)]), strict=True):
            torch.manual_seed(0)
            fit(task, *extra, OTRTCallback(make_teacher(), LAYERS), max_steps=6)
        assert_same(weights(tasks[1]), weights(tasks[0]))

    def test_manual_optimization(self):
        class Manual(Task):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx):
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        trainer = fit(Manual(), OTRTCallback(make_teacher(), LAYERS), OTRTMonitor(1, figures=False))
        assert 0 < trainer.callback_metrics["otrt/gradient_share"] < 1

    def test_wrapped_module(self):
        wrapped = OTRTModule(make_task(), make_teacher(), LAYERS)
        trainer = fit(wrapped, OTRTMonitor(1, figures=False))
        assert "otrt/entropy/net.block1" in trainer.callback_metrics

    def test_two_transfers_and_a_layer_with_two_teacher_layers(self):
        callbacks = [
            OTRTCallback(make_teacher(), [("net.block2", "block1"), ("net.block2", "block2")]),
            OTRTCallback(make_teacher(5), LAYERS),
        ]
        metrics = fit(make_task(), OTRTMonitor(1, figures=False), *callbacks).callback_metrics
        assert {"otrt/distance/net.block2-block1", "otrt/distance/net.block2-block2"} <= set(metrics)
        assert {"otrt/distance/net.block1-2", "otrt/gradient_share-2"} <= set(metrics)

    def test_weight_of_zero(self):
        trainer = fit(make_task(), OTRTCallback(make_teacher(), LAYERS, weight=0.0), OTRTMonitor(1, figures=False))
        assert not [name for name in trainer.callback_metrics if "entropy" in name]

    def test_without_gradients(self):
        trainer = fit(make_task(), OTRTCallback(make_teacher()), OTRTMonitor(1, gradients=False, figures=False))
        assert not [name for name in trainer.callback_metrics if "share" in name]


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
        assert len(runs) == 9 + 9 + 2

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

    def test_a_plan_that_is_not_found_does_not_end_the_fit(self, monkeypatch):
        solve, failed = NeuronTransportDistance._solve, []

        def fail(self, matrix):
            if not failed:
                failed.append(matrix)
                raise RuntimeError("did not converge")
            return solve(self, matrix)

        monkeypatch.setattr(NeuronTransportDistance, "_solve", fail)
        with pytest.warns(UserWarning, match="distances in validation.*did not converge"):
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
        with pytest.warns(UserWarning, match="no distances in validation: a cost that is a function"):
            fit(make_task(ValidatedTask), callback, OTRTMonitor(99, figures=False), validation=loader(8), max_epochs=1)

    def test_a_validation_that_does_not_call_the_student(self):
        class Idle(ValidatedTask):
            def validation_step(self, batch, batch_idx):
                return None

        trainer = fit(
            Idle(),
            OTRTCallback(make_teacher(), LAYERS),
            OTRTMonitor(99, figures=False),
            validation=loader(8),
            max_epochs=1,
        )
        assert "val/otrt/net.block1" not in trainer.callback_metrics


def read(net: Net, name, x):
    found = []
    hook = net.get_submodule(name).register_forward_hook(lambda module, args, output: found.append(output.clone()))
    with hook, torch.no_grad():
        net(x)
    return neurons(found[0], neuron_axis=1)


class TestFigures:
    def run(self, logger, **options):
        monitor = OTRTMonitor(1, **options)
        return fit(make_task(), OTRTCallback(make_teacher(), LAYERS), monitor, logger=logger, max_epochs=2)

    def test_tensorboard(self, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logger = TensorBoardLogger(tmp_path)
        self.run(logger)
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        assert set(events.Tags()["images"]) == {f"otrt/plan/{layer}" for layer in LAYERS}
        assert [event.step for event in events.Images("otrt/plan/net.block1")] == [8, 16]
        assert "otrt/gradient_share" in events.Tags()["scalars"]

    def test_csv(self, tmp_path):
        logger = CSVLogger(tmp_path)
        self.run(logger)
        files = sorted((Path(logger.log_dir) / "otrt" / "plan" / "net.block2").iterdir())
        assert [file.name for file in files] == ["step=16.png", "step=8.png"]
        assert files[0].read_bytes().startswith(b"\x89PNG")

    def test_wandb(self, tmp_path, monkeypatch):
        wandb = pytest.importorskip("wandb")
        for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_DIR", str(tmp_path))):
            monkeypatch.setenv(name, value)
        logger = WandbLogger(project="otrt", save_dir=tmp_path, offline=True)
        self.run(logger)
        summary = dict(logger.experiment.summary)
        wandb.teardown()
        assert {"train/otrt", "otrt/gradient_share", "otrt/distance/net.block1"} <= set(summary)
        assert summary["otrt/plan/net.block2"]["_type"] == "images/separated"
        files = list(tmp_path.rglob("media/images/otrt/plan/net.block1_*.png"))
        assert len(files) == 2
        assert files[0].read_bytes().startswith(b"\x89PNG")

    @pytest.mark.filterwarnings("ignore:MLFlow only allows:RuntimeWarning")  # Lightning's logger takes out colons
    def test_mlflow(self, tmp_path, monkeypatch):
        """Its file store makes folders of names: none may be the beginning of another."""
        pytest.importorskip("mlflow")
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        logger = MLFlowLogger("otrt", tracking_uri=f"file:{tmp_path}")
        layers = [("net.block2", "block1"), ("net.block2", "block2"), ("net.head:input", "head:input")]
        fit(
            make_task(ValidatedTask),
            OTRTCallback(make_teacher(), LAYERS, weight=1.0),
            OTRTCallback(make_teacher(), layers, weight=1.0),
            OTRTMonitor(1),
            logger=logger,
            validation=loader(16),
            max_epochs=2,
        )
        client, run = logger.experiment, logger.run_id
        names = set(client.get_run(run).data.metrics)
        assert {"otrt/distance/net.block1", "otrt/net.headinput-2", "val/otrt/net.block2-block1-2"} <= names
        assert len(client.get_metric_history(run, "otrt/gradient_share")) == 15, "not the first, which finds the layers"
        for name in ("net.block1", "net.block2-block1-2", "net.head:input-2"):
            files = client.list_artifacts(run, f"otrt/plan/{name}")
            assert [Path(file.path).name for file in files] == ["step=16.png", "step=8.png"]

    def test_figures_are_closed(self, tmp_path):
        from matplotlib import pyplot

        before = pyplot.get_fignums()
        self.run(CSVLogger(tmp_path))
        assert pyplot.get_fignums() == before

    def test_without_matplotlib(self, tmp_path, monkeypatch):
        def missing():
            raise ModuleNotFoundError("Figures need matplotlib: pip install matplotlib.")

        monkeypatch.setattr("lightning_otrt.analysis.plot_style.pyplot", missing)
        with pytest.warns(UserWarning, match=r"draws no plans\. Figures need matplotlib"):
            self.run(CSVLogger(tmp_path))


def fit_on_two(folder: str, monitored: bool) -> dict[str, Any]:
    """A fit under DDP with validation: what is logged, drawn and trained."""
    task, callback = make_task(ValidatedTask, norm=False), OTRTCallback(make_teacher(), LAYERS)
    extra = [OTRTMonitor(2)] if monitored else []
    options = {"strategy": "ddp", "devices": 2, "max_epochs": 2, "logger": CSVLogger(folder)}
    trainer = fit(task, callback, *extra, validation=loader(60, 7), **options)
    return {
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "weights": weights(task),
        "clean": hooks(task, callback.transfer.teacher.module) == [],
        "network": task.net,
    }


class TestProcesses:
    def test_two(self, tmp_path):
        found = run_processes(2, fit_on_two, str(tmp_path), True, init=False, timeout=150)
        plain = run_processes(2, fit_on_two, str(tmp_path / "plain"), False, init=False, timeout=150)
        assert found[0]["clean"]
        assert found[1]["clean"]
        assert_same(found[0]["weights"], found[1]["weights"])
        assert_same(found[0]["weights"], plain[0]["weights"])
        for name, width in (("block1", (4, 6)), ("block2", (8, 12))):
            metric = NeuronTransportDistance(*width)
            # Each process has half of the set; the last images come twice, so that both have as many.
            data = [batch for rank in range(2) for batch in shard(rank)]
            teacher = make_teacher().eval()
            for x in data:
                metric.update(*(read(net, name, x) for net in (found[0]["network"].eval(), teacher)))
            for each in found:
                value = each["metrics"][f"val/otrt/net.{name}"]
                assert value == pytest.approx(float(metric.compute()), abs=1e-4)
                assert 0 < each["metrics"]["otrt/gradient_share"] < 1
        drawn = sorted(path.parent.name for path in tmp_path.rglob("step=*.png"))
        assert drawn == ["net.block1"] * 2 + ["net.block2"] * 2, "process 0 draws, once an epoch"


def shard(rank: int) -> list[torch.Tensor]:
    x = torch.cat([batch[0] for batch in loader(60, 60)])
    return list(x[rank::2].split(7))


class TestCompiled:
    @pytest.mark.parametrize("how", ["the network", pytest.param("the module", marks=pytest.mark.slow)])
    def test_compiled(self, how):
        """The shares of the gradient need hooks that compiled code does not call, and this is said."""
        tasks = []
        for monitored in (True, False):
            torch.compiler.reset()
            task = make_task(ValidatedTask)
            if how == "the network":
                task.net.compile(backend="eager")
            model = task if how == "the network" else torch.compile(task, backend="eager")
            callbacks = [OTRTCallback(make_teacher(), LAYERS), *([OTRTMonitor(1, figures=False)] if monitored else [])]
            trainer = make_trainer(callbacks=callbacks, max_epochs=2)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.fit(model, loader(), loader(16))
            tasks.append((task, trainer.callback_metrics, [str(warning.message) for warning in caught]))
        (task, metrics, told), (plain, _, _) = tasks
        assert_same(weights(task), weights(plain))
        assert {"otrt/entropy/net.block1", "otrt/distance/net.block2", "val/otrt/net.block1"} <= set(metrics)
        assert hooks(task) == []
        said = [text for text in told if "OTRTMonitor" in text]
        assert ("otrt/gradient_share" in metrics) == (not said), said


class TestAdvice:
    def told(self, task, callback, **options) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(task, callback, OTRTMonitor(1, figures=False), **options)
        return [
            str(warning.message) for warning in caught if "otrt" in warning.filename or "OTRT" in str(warning.message)
        ]

    def test_nothing_where_all_is_well(self):
        assert self.told(make_task(), OTRTCallback(make_teacher(), LAYERS, weight=2.0), max_steps=8) == []

    def test_few_observations(self):
        callback = OTRTCallback(make_teacher(), {"net.dropout": "dropout"}, memory=0.0, weight=0.1)
        [message] = self.told(make_task(), callback)
        assert "8 observations of 8 and 12 neurons and without memory" in message
        assert 'memory="auto"' in message
        callback = OTRTCallback(make_teacher(), {"net.dropout": "dropout"}, weight=0.1)
        assert self.told(make_task(), callback) == []

    def test_copied_student_with_batch_norm(self):
        task = make_task()
        teacher = copy.deepcopy(task.net)
        [message] = [text for text in self.told(task, OTRTCallback(teacher, LAYERS)) if "BatchNorm" in text]
        assert "its 2 BatchNorm layers (such as 'block1.1') are in train mode" in message
        task = make_task(norm=False)
        assert self.told(task, OTRTCallback(copy.deepcopy(task.net), LAYERS), max_steps=1) == []

    def test_copied_student_with_another_head(self):
        task = make_task()
        teacher = copy.deepcopy(task.net)
        task.net.head = nn.Linear(8, 3)
        assert any("weights of its teacher" in text for text in self.told(task, OTRTCallback(teacher, LAYERS)))

    def test_uniform_plan(self):
        def flat(y, x):
            return 1 + 1e-4 * torch.cdist(y, x)

        callback = OTRTCallback(make_teacher(), LAYERS, cost=flat, weight=1.0)
        [message] = [text for text in self.told(make_task(), callback) if "uniform" in text]
        assert "of 4 student and 6 teacher neurons" in message
        for plan in ("uniform", "random"):
            callback = OTRTCallback(make_teacher(), LAYERS, plan=plan, weight=1.0)
            assert not [text for text in self.told(make_task(), callback) if "uniform" in text]

    @pytest.mark.parametrize(("weight", "text"), [(1e-4, "changes next to nothing"), (1e4, "task hardly counts")])
    def test_weight_out_of_range(self, weight, text):
        [message] = self.told(make_task(lr=1e-6), OTRTCallback(make_teacher(), LAYERS, weight=weight), max_steps=8)
        assert text in message
        assert "suggest_weight" in message

    def test_a_warm_up_is_meant_to_be_weak(self):
        callback = OTRTCallback(make_teacher(), LAYERS, weight=1.0, schedule=LinearWarmup(10_000))
        assert self.told(make_task(lr=1e-3), callback, max_steps=8) == []


class TestWiring:
    def test_no_transfer_to_look_at(self):
        with pytest.raises(MisconfigurationException, match="found no representation transfer"):
            fit(make_task(), OTRTMonitor())

    @pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"every_n_steps": True}, {"every_n_epochs": None}])
    def test_intervals(self, options):
        with pytest.raises((TypeError, ValueError), match="to be a positive integer"):
            OTRTMonitor(**options)

    def test_validate_and_test_alone(self):
        trainer = make_trainer(callbacks=[OTRTMonitor()])
        trainer.validate(make_task(ValidatedTask), loader(8), verbose=False)
        trainer.test(make_task(ValidatedTask), loader(8), verbose=False)

    @pytest.mark.parametrize("where", ["training_step", "validation_step"])
    def test_leaves_nothing_behind(self, where):
        task, teacher = make_task(ValidatedTask), make_teacher()
        callbacks = [OTRTCallback(teacher, LAYERS), OTRTMonitor(1, figures=False)]
        fit(task, *callbacks, validation=loader(8), max_epochs=1)
        self.check_clean(task, teacher)

        class Fails(ValidatedTask):
            pass

        def fail(self, batch, batch_idx):
            if self.global_step > 1:
                raise KeyError("user")
            return self.loss(batch)

        setattr(Fails, where, fail)
        task = Fails()
        with pytest.raises(KeyError, match="user"):
            fit(task, *callbacks, validation=loader(8), max_epochs=1)
        self.check_clean(task, teacher)

    @staticmethod
    def check_clean(task, teacher):
        assert hooks(task, teacher) == []
        assert not {"training_step", "manual_backward"} & set(vars(task))

    def test_fits_again(self):
        monitor, callback = OTRTMonitor(1, figures=False), OTRTCallback(make_teacher(), LAYERS)
        for _ in range(2):
            assert "otrt/gradient_share" in fit(make_task(), callback, monitor).callback_metrics

    def test_copies(self):
        assert copy.deepcopy(OTRTMonitor(3)).every_n_steps == 3
