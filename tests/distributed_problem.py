"""Networks and batches that are trained on one process and on several, with numbers that agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = {"0": "0", "3": "3"}
#: In float64.
TOLERANCE = 1e-10


def net(width: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(36 * width, 2 * width),
            nn.Linear(2 * width, 3),
        ).double()


def batch(call: int, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(call)
    x = torch.randn(sum(sizes), 1, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (sum(sizes),), generator=generator)


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
