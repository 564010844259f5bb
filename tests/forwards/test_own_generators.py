"""Networks that draw from generators of their own: training draws what it would alone, and other noise is told of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

X = seeded(0, torch.randn, 12, 6)
NOISE: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]] = {
    "torch": (lambda: torch.Generator().manual_seed(3), lambda own, x: torch.randn(x.shape, generator=own)),
    "NumPy": (lambda: np.random.default_rng(3), lambda own, x: torch.from_numpy(own.normal(size=x.shape)).float()),
    "NumPy, older": (
        lambda: np.random.RandomState(3),
        lambda own, x: torch.from_numpy(own.normal(size=x.shape)).float(),
    ),
}


class Noisy(nn.Module):
    """Adds noise in both modes, as networks of diffusion do."""

    def __init__(self, kind: str, width: int = 8) -> None:
        super().__init__()
        make, self.draw = NOISE[kind]
        self.own, self.drawn = make(), []
        self.body, self.head = nn.Sequential(nn.Linear(6, width), nn.ReLU()), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        noise = self.draw(self.own, x)
        if self.training:
            self.drawn.append(float(noise.flatten()[0]))
        return self.head(self.body(x + noise))


@pytest.mark.parametrize("kind", NOISE)
def test_training_draws_what_it_would_alone(kind: str) -> None:
    alone, student = seeded(1, Noisy, kind), seeded(1, Noisy, kind)
    for _ in range(3):
        alone(X)
    transfer = RepresentationTransfer(seeded(2, Noisy, kind, 12), ["body"], weight=1.0)
    with warnings.catch_warnings(), transfer.attached(student):
        warnings.simplefilter("ignore")
        for _ in range(3):
            student(X)
            transfer.loss()
    assert student.drawn == alone.drawn


@pytest.mark.parametrize("kind", NOISE)
def test_other_noise_is_told_of(kind: str) -> None:
    student = seeded(1, Noisy, kind)
    transfer = RepresentationTransfer(copy.deepcopy(student), ["body"], weight=1.0)
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        for _ in range(2):
            student(X)
            transfer.loss()
    [message] = [str(warning.message) for warning in caught]
    assert "draws random numbers although it runs in evaluation mode" in message
