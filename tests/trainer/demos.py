"""The demo modules of Lightning with data of their own, and a teacher for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from helpers import (
    Task,
    make_teacher,
)
from lightning.pytorch.demos import boring_classes, lstm, transformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_otrt import LayerPair

TOKENS, WORDS, BATCHES = 6, 11, 4


class Fed(pl.LightningModule):
    """Mixed into a demo, it brings data of its own; steps, losses and optimizers are those of the demo."""

    batch_size = 8
    flops_per_batch = 1000
    trunk = ""

    @staticmethod
    def example(generator: torch.Generator) -> Any:
        return torch.randn(32, generator=generator)

    def prepare_data(self) -> None:
        """Two of the demos would download a text."""

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(3)
        data = [self.example(generator) for _ in range(8 * BATCHES)]
        return DataLoader(data, batch_size=self.batch_size, drop_last=True)

    @property
    def backbone(self) -> nn.Module:
        return self.get_submodule(self.trunk)


class Boring(Fed, boring_classes.BoringModel):
    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()


class Manual(Boring, boring_classes.ManualOptimBoringModel):
    pass


class Demo(Fed, boring_classes.DemoModel):
    pass


class Images(Fed):
    """The network of the demos for MNIST, in the way in which the documentation of Lightning trains it."""

    trunk = "net.conv1"

    def __init__(self) -> None:
        super().__init__()
        self.net = boring_classes.Net()

    @staticmethod
    def example(generator: torch.Generator) -> Any:
        return torch.randn(1, 28, 28, generator=generator), torch.randint(10, (), generator=generator)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.nll_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class LSTM(Fed, lstm.LightningLSTM):
    trunk = "model.encoder"

    def __init__(self) -> None:
        super().__init__(vocab_size=WORDS)
        self.model = lstm.SimpleLSTM(WORDS, ninp=6, nhid=8, nlayers=2)

    @staticmethod
    def example(generator: torch.Generator) -> Any:
        text = torch.randint(WORDS, (TOKENS + 1,), generator=generator)
        return text[:-1], text[1:]

    def on_train_start(self) -> None:
        """Finders change the size of the batches between two fits, which the hidden state of the demo would survive."""
        self.hidden = None


class Transformer(Fed, transformer.LightningTransformer):
    trunk = "model.embedding"
    example = staticmethod(LSTM.example)

    def __init__(self) -> None:
        super().__init__(vocab_size=WORDS)
        self.model = transformer.Transformer(WORDS, ninp=8, nhead=2, nhid=8, nlayers=1)


class Normed(Fed, Task):
    """Not one of the demos: those have no BatchNorm, for which an average of the weights trains an epoch more."""

    trunk = "net.block1.0"

    @staticmethod
    def example(generator: torch.Generator) -> Any:
        return torch.randn(1, 8, 8, generator=generator), torch.randint(3, (), generator=generator)


class Deep(nn.Sequential):
    """In place of the single layer of the smallest demos, of which no part could be frozen."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 2))


def deep(kind: type[Fed], name: str) -> Fed:
    module = kind()
    setattr(module, name, Deep())
    module.trunk = f"{name}.0"
    return module


@dataclass(frozen=True)
class Case:
    """A demo, and what is matched in it: layers whose outputs have their neurons on ``axis``."""

    build: Callable[[], Fed]
    student: str
    teacher: str
    network: Callable[[], nn.Module]
    root: str = ""
    axis: int = 1
    prunable: str = ""
    in_parts: Callable[[], Fed] | None = None
    teacher_inputs: Callable[..., Any] | None = None

    @property
    def pair(self) -> LayerPair:
        return LayerPair(self.student, self.teacher, neuron_axis=self.axis)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 7), nn.ReLU())


class Text(nn.Module):
    """A teacher for the recurrent demo, which takes a hidden state, too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(WORDS, 5)
        self.top = nn.Linear(5, 9)

    def forward(self, words: Tensor, hidden: Any) -> Tensor:
        return self.top(self.encoder(words))


def without_state(words: Tensor, hidden: Any) -> tuple[Tensor, None]:
    """The demo goes on from the hidden state of the last batch, which is one of the student."""
    return words, None


DEMOS = {
    "boring": Case(Boring, "layer", "0", mlp, prunable="layer", in_parts=partial(deep, Boring, "layer")),
    "manual": Case(Manual, "layer", "0", mlp, prunable="layer", in_parts=partial(deep, Manual, "layer")),
    "demo": Case(Demo, "l1", "0", mlp, prunable="l1", in_parts=partial(deep, Demo, "l1")),
    "images": Case(Images, "net.conv2", "conv1", boring_classes.Net, root="net", prunable="net.fc1"),
    "lstm": Case(
        LSTM, "model.rnn", "top", Text, root="model", axis=2, prunable="model.decoder", teacher_inputs=without_state
    ),
    "transformer": Case(
        Transformer,
        "model.transformer.encoder.layers.0",
        "transformer.encoder.layers.0",
        partial(transformer.Transformer, WORDS, ninp=6, nhead=2, nhid=6, nlayers=1),
        root="model",
        axis=2,
        prunable="model.decoder",
    ),
    "batch norm": Case(Normed, "net.block2", "block2", make_teacher, root="net", prunable="net.head"),
}
