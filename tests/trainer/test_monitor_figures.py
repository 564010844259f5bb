"""Pictures of plans in the loggers."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import (
    LAYERS,
    ValidatedTask,
    loader,
    make_task,
    make_teacher,
)
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from trainer.monitored import fit

from lightning_otrt import OTRTCallback
from lightning_otrt.trainer.monitor import OTRTMonitor


class TestFigures:
    def run(self, logger, plan="sinkhorn", monitor=None):
        callback = OTRTCallback(make_teacher(), LAYERS, plan=plan, weight=1.0)
        return fit(make_task(), callback, monitor or OTRTMonitor(1), logger=logger, max_epochs=2)

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
        from matplotlib import pyplot

        logger, before = CSVLogger(tmp_path), pyplot.get_fignums()
        self.run(logger)
        assert pyplot.get_fignums() == before, "figures are closed"
        files = sorted((Path(logger.log_dir) / "otrt" / "plan" / "net.block2").iterdir())
        assert [file.name for file in files] == ["step=16.png", "step=8.png"]
        assert files[0].read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("plan", ["orthogonal", pytest.param("random_orthogonal", marks=pytest.mark.slow)])
    def test_rotations(self, tmp_path, plan):
        """They have singular values and directions in place of the picture and the figures of a plan."""
        logger = CSVLogger(tmp_path)
        self.run(logger, plan)
        files = sorted((Path(logger.log_dir) / "otrt" / "singular_values" / "net.block2").iterdir())
        assert [file.name for file in files] == ["step=16.png", "step=8.png"]
        assert not (Path(logger.log_dir) / "otrt" / "plan").exists()
        header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(",")
        assert {"otrt/distance/net.block1", "otrt/gradient_share"} <= set(header)
        assert ("otrt/directions/net.block1" in header) == (plan == "orthogonal"), "those of a random one say nothing"
        assert not [name for name in header if "entropy" in name or "marginal" in name]

    # Not slow: what it leaves in a process changes what the slow tests of test_soak.py count.
    @pytest.mark.slow
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

    @pytest.mark.slow
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
        assert {"otrt/distance/net.block1", "otrt/distance/net.headinput-2", "val/otrt/net.block2-block1-2"} <= names
        assert len(client.get_metric_history(run, "otrt/gradient_share")) == 15, "not the first, which finds the layers"
        for name in ("net.block1", "net.block2-block1-2", "net.head:input-2"):
            files = client.list_artifacts(run, f"otrt/plan/{name}")
            assert [Path(file.path).name for file in files] == ["step=16.png", "step=8.png"]

    def test_without_matplotlib(self, tmp_path, monkeypatch):
        def missing():
            raise ModuleNotFoundError("Figures need matplotlib: pip install matplotlib.")

        monitor = OTRTMonitor(1)
        with monkeypatch.context() as patch:
            patch.setattr("lightning_otrt.analysis.plot_style.pyplot", missing)
            with pytest.warns(UserWarning, match=r"draws no plans\. Figures need matplotlib"):
                self.run(CSVLogger(tmp_path / "first"), monitor=monitor)
        assert monitor.figures, "an argument of the constructor stays as it is"
        self.run(second := CSVLogger(tmp_path / "second"), monitor=monitor)
        assert not [*tmp_path.glob("first/**/*.png")]
        assert len([*Path(second.log_dir).rglob("*.png")]) == 2 * len(LAYERS)
