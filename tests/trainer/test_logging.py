"""What a fit logs, under which names and with which batch size."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    Task,
    loader,
    make_data,
    make_task,
    make_trainer,
)
from lightning.pytorch.callbacks import (
    TQDMProgressBar,
)
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainer.fits import Seen, fitted, make_callback


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
        assert [values["otrt/distance/net.block1"], values["otrt/distance/net.block2"]] == layers
        assert values["otrt/weight"] == 3.0
    assert len({values["train/otrt"] for values in seen.values}) == 4
    assert seen.bar == ["train/otrt"]


def test_names_of_layers_do_not_meet_other_names():
    """A layer may be called `weight` or `gradient_share`."""

    class Odd(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.layer = self.layer, None

        def forward(self, x: Tensor) -> Tensor:
            return self.weight(x)

    seen = Seen()
    callback = make_callback(nn.Linear(32, 2), layers={"weight": ""}, weight=3.0)
    make_trainer(callbacks=[callback, seen]).fit(Odd(), DataLoader(RandomDataset(32, 64), batch_size=16))
    assert seen.values[-1]["otrt/weight"] == 3.0
    assert 0 < seen.values[-1]["otrt/distance/weight"] < 2


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
