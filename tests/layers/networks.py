"""Networks whose traces the tests of layers read."""

from __future__ import annotations

from collections import namedtuple

import torch
from torch import Tensor, nn

Halves = namedtuple("Halves", ["left", "right"])


class Net(nn.Module):
    """Four stages and a head, of any width."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(3, width, 3, padding=1)
        self.layer2 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.layer3 = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.ReLU())
        self.layer4 = nn.Conv2d(2 * width, 3 * width, 3, 2, 1)
        self.fc = nn.Linear(3 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


class Task(nn.Module):
    """As a LightningModule that holds the network and more."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Gives(nn.Module):
    """Gives what a function makes of its input."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


class Odd(nn.Module):
    """One module for each thing that cannot be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.twice = nn.ReLU()
        self.unused = nn.Linear(6, 5)
        self.stack = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.mapping = Gives(lambda x: {"hidden": x, "pooled": x.mean(1)})
        self.two = Gives(lambda x: (x, 2 * x))
        self.one = Gives(lambda x: (x, None))
        self.named = Gives(lambda x: Halves(x, None))
        self.boxes = Gives(lambda x: ["box"])
        self.integer = Gives(lambda x: x.long())
        self.boolean = Gives(lambda x: x > 0)
        self.complex = Gives(lambda x: x.to(torch.complex64))
        self.scalar = Gives(lambda x: x.mean())
        self.vector = Gives(lambda x: x.mean(1))
        self.cube = Gives(lambda x: x[:, :, None, None].clone())
        self.listed = Gives(lambda tensors: tensors[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.fc(x)))
        for layer in self.stack:
            x = layer(x)
        for name, module in self.named_children():
            if isinstance(module, Gives) and name != "listed":
                module(x)
        return self.listed([x])
