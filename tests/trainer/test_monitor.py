"""What the monitor logs of training steps, where it looks, and that it changes nothing."""

from __future__ import annotations

import copy
import warnings
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
    seeded,
    weights,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from processes import run_processes
from torch.utils.data import DataLoader
from trainer.monitored import column, fit, read, repeated, rows, shard

from lightning_otrt import NeuronTransportDistance, OTRTCallback, OTRTModule
from lightning_otrt.analysis.gradient_share import GradientProbe
from lightning_otrt.trainer.monitor import OTRTMonitor


class TestTraining:
    def test_what_is_logged(self, tmp_path):
        logger = CSVLogger(tmp_path)
        fit(
            make_task(), OTRTCallback(make_teacher(), LAYERS), OTRTMonitor(2, figures=False), logger=logger, max_steps=6
        )
        for layer in LAYERS:
            for name in ("otrt/marginal_error/", "otrt/entropy/", "otrt/layer_share/"):
                values = column(logger, f"{name}{layer}")
                assert list(values) == [1, 3, 5]
                assert all(0 < value < 1 for value in values.values())
        assert list(column(logger, "otrt/gradient_share")) == [1, 3, 5]
        assert not any("off_identity" in name for name in rows(logger)[0])
        # The distances are those of the callback alone, at each step.
        assert list(column(logger, "otrt/distance/net.block1")) == [*range(6)]

    def test_interval_of_the_trainer(self, tmp_path):
        logger = CSVLogger(tmp_path)
        monitor = OTRTMonitor(figures=False)
        fit(make_task(), OTRTCallback(make_teacher(), LAYERS), monitor, logger=logger, max_steps=6, log_every_n_steps=3)
        assert list(column(logger, "otrt/entropy/net.block1")) == [2, 5]

    @pytest.mark.parametrize(("every", "expected"), [(None, 0), (2, 3)])
    def test_a_trainer_that_logs_nothing(self, every, expected, monkeypatch):
        """Each measurement costs a second backward pass."""
        measured: list[Any] = []
        split = GradientProbe.split
        monkeypatch.setattr(GradientProbe, "split", lambda *args: measured.append(args) or split(*args))
        monitor = OTRTMonitor(every, figures=False)
        fit(make_task(), OTRTCallback(make_teacher(), LAYERS), monitor, max_steps=6, log_every_n_steps=0)
        assert len(measured) == expected

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

    def test_a_schedule_with_pauses(self, tmp_path):
        """What is logged is what the step had, not what the next one will have."""
        logger, full = CSVLogger(tmp_path), 4.0
        monitor, options = OTRTMonitor(1, figures=False), {"logger": logger, "max_steps": 6}
        callback = OTRTCallback(make_teacher(), LAYERS, weight=full, schedule=lambda step: float(step % 2 == 0))
        fit(make_task(), callback, monitor, log_every_n_steps=1, **options)
        assert [value / full for value in column(logger, "otrt/weight").values()] == [1, 0] * 3
        for name in ("entropy/net.block1", "layer_share/net.block2", "gradient_share"):
            measured = column(logger, f"otrt/{name}")
            # In the first step the layers are not known before it.
            assert list(measured) == ([0, 2, 4] if "entropy" in name else [2, 4])

    def test_a_part_that_is_not_trained(self, recwarn):
        task = make_task()
        task.net.block1.requires_grad_(False)
        trainer = fit(task, OTRTCallback(make_teacher(), LAYERS), OTRTMonitor(1, figures=False), max_steps=3)
        assert 0 < trainer.callback_metrics["otrt/layer_share/net.block2"] < 1
        assert "otrt/layer_share/net.block1" not in trainer.callback_metrics
        assert not [each for each in recwarn if "Code that is compiled" in str(each.message)]

    def test_without_gradients(self):
        trainer = fit(make_task(), OTRTCallback(make_teacher()), OTRTMonitor(1, gradients=False, figures=False))
        assert not [name for name in trainer.callback_metrics if "share" in name]


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


class TestCompiled:
    @pytest.mark.slow
    @pytest.mark.parametrize("how", ["the network", "the module"])
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


class TestWiring:
    def test_no_transfer_to_look_at(self):
        with pytest.raises(MisconfigurationException, match="found no representation transfer"):
            fit(make_task(), OTRTMonitor())

    @pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"every_n_steps": True}, {"every_n_epochs": None}])
    def test_intervals(self, options):
        with pytest.raises((TypeError, ValueError), match="to be a positive integer"):
            OTRTMonitor(**options)

    @pytest.mark.parametrize("flag", ["gradients", "validation", "figures"])
    def test_flags(self, flag):
        with pytest.raises(TypeError, match=f"`{flag}` to be True or False, but got 'no' of type str"):
            OTRTMonitor(**{flag: "no"})

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

    def test_an_epoch_that_a_hook_ends_early(self):
        """Lightning then calls the start of a batch without its end."""

        class Stops(Task):
            def on_train_batch_start(self, batch, batch_idx):
                return -1 if batch_idx == 2 else None

        task, teacher = seeded(0, Stops), make_teacher()
        fit(task, OTRTCallback(teacher, LAYERS), OTRTMonitor(1, figures=False), max_epochs=3)
        self.check_clean(task, teacher)

    def test_a_batch_that_is_none(self, monkeypatch):
        logged: list[Any] = []
        monkeypatch.setattr(OTRTMonitor, "_log", lambda self, trainer, values: logged.append(values))
        x, y = next(iter(loader(batch_size=8)))
        data = DataLoader([0, 1, None, 3], batch_size=None, collate_fn=lambda each: None if each is None else (x, y))
        callbacks = OTRTCallback(make_teacher(), LAYERS), OTRTMonitor(1, figures=False)
        with pytest.warns(UserWarning, match="yielded None"):
            fit(make_task(), *callbacks, data=data, max_epochs=1)
        assert len(logged) == 3

    def test_a_second_fit_of_a_network_with_other_layers(self):
        class Other(Task):
            def __init__(self):
                super().__init__()
                self.other, self.net = self.net, None

            def loss(self, batch):
                return torch.nn.functional.cross_entropy(self.other(batch[0]), batch[1])

        monitor, callback = OTRTMonitor(1, figures=False), OTRTCallback(make_teacher(), "blocks")
        for kind in (Task, Other):
            assert "otrt/gradient_share" in fit(make_task(kind), callback, monitor, max_steps=3).callback_metrics

    def test_fits_again(self):
        monitor, callback = OTRTMonitor(1, figures=False), OTRTCallback(make_teacher(), LAYERS)
        for _ in range(2):
            assert "otrt/gradient_share" in fit(make_task(), callback, monitor).callback_metrics

    def test_copies(self):
        assert copy.deepcopy(OTRTMonitor(3)).every_n_steps == 3

    def test_repr(self):
        assert repr(OTRTMonitor()) == "OTRTMonitor()"
        assert repr(OTRTMonitor(3, gradients=False)) == "OTRTMonitor(every_n_steps=3, gradients=False)"
