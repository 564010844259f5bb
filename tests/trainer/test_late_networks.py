"""Networks that are built after the callback's ``setup``: in the module's own, or in ``configure_model``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchvision
from helpers import LAYERS, Task, assert_same, hooks, loader, make_task, make_teacher, make_trainer, seeded, weights
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from trainer.fits import make_callback
from transformers import DistilBertConfig, DistilBertModel

from lightning_otrt import OTRTCallback, OTRTModule
from lightning_otrt.trainer.transfer_term import TransferTerm


class InSetup(Task):
    """Builds its network when the data are known."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.1, 8
        del self.net

    def setup(self, stage: str) -> None:
        self.net = make_task().net

    def train_dataloader(self) -> Any:
        return loader(64, self.batch_size)


class InConfigureModel(InSetup):
    def setup(self, stage: str) -> None:
        """Nothing."""

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            super().setup("fit")


@pytest.mark.parametrize("layers", [LAYERS, "auto", "penultimate"])
@pytest.mark.parametrize("kind", [InSetup, InConfigureModel])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_fit_is_that_of_a_network_built_before(kind: type[Task], layers: Any, wrapped: bool) -> None:
    found = []
    for task in (kind(), make_task()):
        if wrapped:
            module = OTRTModule(task, make_teacher(), layers, weight=2.0)
            transfer, callbacks = module.otrt, []
        else:
            callback = make_callback(layers=layers)
            module, transfer, callbacks = task, callback.transfer, [callback]
        trainer = make_trainer(callbacks=callbacks)
        trainer.fit(module, loader())
        found.append(({name: tensor for name, tensor in weights(task).items() if "net" in name}, transfer.engine.calls))
        assert not hooks(task)
        assert trainer.callback_metrics["train/otrt"] > 0
    assert_same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] == 4


@pytest.mark.parametrize("kind", [InSetup, InConfigureModel])
def test_a_name_that_does_not_exist_is_told_when_the_network_is_there(kind: type[Task]) -> None:
    task = kind()
    with pytest.raises(ValueError, match=r"No layer 'net\.block7' in the student.*net\.block1"):
        make_trainer(callbacks=[make_callback(layers={"net.block7": "block1"})]).fit(task, loader())
    assert not hooks(task)
    assert "training_step" not in vars(task)


FINDERS: dict[str, Callable[[], pl.Callback]] = {
    "rate": lambda: LearningRateFinder(num_training_steps=4, update_attr=True),
    "size": lambda: BatchSizeFinder(steps_per_trial=1, init_val=4, max_trials=2),
}


@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("first", [False, True])
def test_finders_train_with_the_term(finder: str, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they come before the callback, so that they train before its ``on_fit_start``."""
    callback, counts = make_callback(), []
    step = TransferTerm.term

    def counted(self: TransferTerm, position: int) -> Tensor | None:
        term = step(self, position)
        counts.append(float(term.detach()))
        return term

    monkeypatch.setattr(TransferTerm, "term", counted)
    callbacks = [FINDERS[finder](), callback]
    trainer = make_trainer(callbacks=callbacks if first else callbacks[::-1], default_root_dir=tmp_path)
    task = InSetup()
    trainer.fit(task)
    assert len(counts) > 4
    assert min(counts) > 0
    assert not hooks(task)


def test_the_tuner_trains_with_the_term(tmp_path: Path) -> None:
    callback = make_callback()
    trainer = make_trainer(callbacks=[callback], default_root_dir=tmp_path)
    task = InSetup()
    Tuner(trainer).lr_find(task, num_training=4, update_attr=True)
    assert callback.transfer.engine is not None
    trainer.fit(task)
    assert callback.transfer.engine.calls == 4


class Data(pl.LightningDataModule):
    classes = 3

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(8, 3, 64, 64), torch.arange(8) % self.classes), batch_size=4)


class Images(pl.LightningModule):
    """A network of torchvision with as many classes as the data have."""

    def setup(self, stage: str) -> None:
        torch.manual_seed(0)
        self.net = torchvision.models.resnet18(num_classes=self.trainer.datamodule.classes)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_a_network_of_torchvision() -> None:
    callback = OTRTCallback(seeded(1, torchvision.models.resnet18, num_classes=5))
    make_trainer(callbacks=[callback], max_steps=2).fit(Images(), datamodule=Data())
    assert callback.transfer.pairs[-1].student == "net.layer4"
    assert callback.transfer.engine.calls == 2


def distilbert(width: int) -> nn.Module:
    return DistilBertModel(DistilBertConfig(vocab_size=30, dim=width, n_layers=2, n_heads=2, hidden_dim=16))


class Text(pl.LightningModule):
    """A network of Hugging Face that is built where the strategy wants it."""

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net, self.head = distilbert(8), nn.Linear(8, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.net(batch[0]).last_hidden_state[:, 0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_a_network_of_hugging_face() -> None:
    callback = OTRTCallback(distilbert(12), "blocks", student_root="net")
    data = DataLoader(TensorDataset(torch.randint(30, (8, 6)), torch.arange(8) % 2), batch_size=4)
    make_trainer(callbacks=[callback], max_steps=2).fit(Text(), data)
    assert callback.transfer.engine.calls == 2


class LateBoring(BoringModel):
    """Lightning's demo module, which makes its layer late."""

    def __init__(self) -> None:
        super().__init__()
        del self.layer

    def setup(self, stage: str) -> None:
        self.layer = nn.Linear(32, 2)


def test_the_demo_module_of_lightning() -> None:
    callback = OTRTCallback(nn.Linear(32, 6), {"layer": ""})
    trainer = make_trainer(callbacks=[callback], max_steps=2, limit_val_batches=0)
    trainer.fit(LateBoring(), DataLoader(RandomDataset(32, 16), batch_size=8))
    assert callback.transfer.engine.calls == 2
