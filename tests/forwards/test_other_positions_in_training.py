"""Layers with other positions in training than in evaluation: told once; noise on the inputs is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

WORDS, IMAGES = seeded(0, torch.randint, 0, 50, (6, 12)), seeded(1, torch.randn, 6, 3, 16, 16)


class Tokens(nn.Module):
    """Changes what its embedding gives, in training."""

    def __init__(self, width: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.change = nn.Embedding(50, width), change
        self.block, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.block(self.change(x) if self.training else x).mean(1))


class Maps(nn.Module):
    """Changes its images, in training."""

    def __init__(self, width: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.head, self.change = nn.Conv2d(3, width, 3, 2, 1), nn.Linear(width, 3), change

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.change(x) if self.training else x).mean((2, 3)))


def _told(kind: type[nn.Module], change: Callable[[Tensor], Tensor], batch: Tensor) -> list[str]:
    transfer, student = RepresentationTransfer(kind(12, change), ["block"]), kind(8, change)
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        for _ in range(2):
            student(batch)
            transfer.loss()
        assert not student.block._forward_hooks or len(student.block._forward_hooks) == 1  # the reader
    return [str(warning.message) for warning in caught]


def test_tokens_that_are_dropped() -> None:
    [message] = _told(Tokens, lambda x: x[:, torch.randperm(12)[:8]], WORDS)
    assert message.startswith("The student layers ['block'] have other positions in training than in evaluation mode")
    assert "'block' has (8,) in training and (12,) in evaluation mode" in message


def test_dropout_of_tokens_keeps_their_number() -> None:
    assert _told(Tokens, nn.Dropout(0.3), WORDS) == []


def test_images_of_another_size_are_told_once() -> None:
    [message] = _told(Maps, lambda x: x[..., :12, :12], IMAGES)
    assert message.startswith("The forward of the student changes its inputs in training")


NOISE = {
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "brightness": lambda x: x * (1 + 0.2 * torch.rand(len(x), 1, 1, 1)),
    "clipped": lambda x: x.clamp(-2.5, 2.5),
    "shifted": lambda x: x + 0.3,
}
OTHERS = {
    "flipped": lambda x: x.flip(3),
    "some flipped": lambda x: torch.cat([x[:1].flip(3), x[1:]]),
    "mixed": lambda x: 0.6 * x + 0.4 * x.flip(0),
    "rolled": lambda x: x.roll(3, 2),
    "strong noise": lambda x: x + torch.randn_like(x),
}


@pytest.mark.parametrize("name", NOISE)
def test_small_noise_is_none_of_the_teachers_business(name: str) -> None:
    assert _told(Maps, NOISE[name], IMAGES) == []


@pytest.mark.parametrize("name", OTHERS)
def test_other_samples(name: str) -> None:
    [message] = _told(Maps, OTHERS[name], IMAGES)
    assert message.startswith("The forward of the student changes its inputs in training")
