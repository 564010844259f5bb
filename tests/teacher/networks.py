"""Networks of the tests of teachers, and what of a module must not change."""

from __future__ import annotations

import hashlib
from typing import Any

import lightning
import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A module with every kind of state, at module level so that it pickles."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.5))
        self.head = nn.Linear(width, 2)
        #: Type of the input, train mode, gradient mode and inference mode in the last forward.
        self.seen: Any = None

    def forward(self, x: Tensor, scale: Any = 1.0) -> Tensor:
        self.seen = (x.dtype, self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        return self.head(self.body(x)) * scale


class Lit(lightning.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Silent(lightning.LightningModule):
    """A LightningModule without a forward of its own."""


def digest(module: nn.Module) -> str:
    """A checksum of all parameters and buffers, with their names, types and shapes."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def modes(module: nn.Module) -> dict[str, bool]:
    """Which modules are in train mode."""
    return {name: inner.training for name, inner in module.named_modules()}
