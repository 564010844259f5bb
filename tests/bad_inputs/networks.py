"""Networks and tasks with something unusual in them, which several files share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as other_lightning
import torch
from helpers import CLASSES, Net, Task, make_task, seeded
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.nn import functional as F


class OtherTask(other_lightning.LightningModule):
    """A module of the other Lightning package."""

    def __init__(self) -> None:
        super().__init__()
        self.net = seeded(0, Net)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Special(nn.Module):
    """A convolution whose output is made into something else."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.make = nn.Conv2d(1, 4, 3, padding=1), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.conv(x))


class SpecialNet(Net):
    """With a layer that gives something unusual, of which the outputs of the network do not depend."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.special = Special(make)
        self.parts = nn.ModuleList([nn.Linear(8, 8)])
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.special(x)
        return self.head(self.parts[0](self.block2(F.max_pool2d(self.block1(x), 2)).mean((2, 3))))


def special(make: Callable[[Tensor], Any] = torch.relu) -> Callable[[], Task]:
    return lambda: with_net(SpecialNet, make)


def with_net(kind: Callable[..., nn.Module], *args: Any, task: type[Task] = Task) -> Task:
    module = make_task(task)
    module.net = seeded(0, kind, *args)
    return module


class EvaluationNet(Net):
    """Runs its first block as a whole in evaluation mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1[0](x) if self.training else self.block1(x)
        return self.head(self.block2(F.max_pool2d(x, 2)).mean((2, 3)))


class Grid(nn.Module):
    """Channels-last maps, the second of which no module tells from channels-first ones."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.norm, self.gate = nn.Linear(1, width), nn.LayerNorm(width), Gate()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(self.norm(self.embed(x.permute(0, 2, 3, 1)))).mean((1, 2)))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class Tokens(nn.Module):
    """Tokens (B, T, C), one for each patch of an image; a square of them, or a row."""

    def __init__(self, patch: tuple[int, int] = (2, 2), width: int = 8) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(1, width, patch, patch), nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x).flatten(2).mT).mean(1))


class RowTokens(nn.Module):
    """Tokens (B, T, C), one for each row of an image; no map of patches stands before them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.norm = nn.LazyLinear(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)
        self.embed(torch.zeros(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x[:, 0])).mean(1))


class Unhooked(Task):
    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net.forward(batch[0]), batch[1])


class OddStrategy(Strategy):
    """One with which the package was never run."""

    root_device = torch.device("cpu")
    global_rank = local_rank = node_rank = 0
    world_size = 1
    is_global_zero = True

    def barrier(self, name: str | None = None) -> None: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def all_reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    def model_to_device(self) -> None: ...


def frozen(*names: str) -> Callable[[], Task]:
    def build() -> Task:
        task = make_task()
        for name in names:
            task.get_submodule(name).requires_grad_(False)
        return task

    return build
