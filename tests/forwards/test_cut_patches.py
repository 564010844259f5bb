"""Patches that code cuts out of images, and a linear map embeds: no map shows their rows and columns."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_otrt import LayerPair, RepresentationTransfer, transport_distance

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Cut(nn.Module):
    """A vision transformer without a convolution."""

    def __init__(self, width: int, size: int, *, token: bool = False) -> None:
        super().__init__()
        self.embed, self.size = nn.Linear(3 * size**2, width), size
        self.cls_token = nn.Parameter(torch.randn(1, 1, width)) if token else None
        self.mix = nn.TransformerEncoderLayer(width, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(functional.unfold(images, self.size, stride=self.size).mT)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], 1)
        return self.head(self.mix(tokens).mean(1))


class Words(nn.Module):
    """Words of another number, with a mask of four axes."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.stride = stride

    def forward(self, words: Tensor, allowed: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(words[:, :: self.stride])).mean(1))


def term(student: nn.Module, teacher: nn.Module, *inputs: Tensor, grid: int = 4) -> tuple[float, list[str]]:
    transfer = RepresentationTransfer(
        teacher, [LayerPair("mix", "mix")], weight=1.0, plan="exact", cost="sqeuclidean", memory=0.0, grid=grid
    )
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        student(*inputs)
        value = float(transfer.loss().detach())
    return value, [str(warning.message) for warning in caught if "different numbers of tokens" in str(warning.message)]


@pytest.mark.parametrize("token", [False, True])
def test_other_numbers_of_patches_are_told(token: bool) -> None:
    torch.manual_seed(0)
    _, told = term(Cut(8, 4, token=token), Cut(12, 8, token=token), IMAGES)
    assert len(told) == 1
    assert told[0].startswith("The pairs ['mix -> mix'] have different numbers of tokens. These are patches of images")


def test_as_many_patches_are_the_same_parts() -> None:
    torch.manual_seed(0)
    student, teacher = Cut(8, 4), Cut(12, 4)
    value, told = term(student, teacher, IMAGES)
    assert told == []
    found = []
    for net in (student, teacher):
        tokens = net.mix(net.embed(functional.unfold(IMAGES, 4, stride=4).mT)).detach().mT
        found.append(functional.adaptive_avg_pool1d(tokens, 16).transpose(0, 1).flatten(1))
    assert value == pytest.approx(float(transport_distance(*found, plan="exact", cost="sqeuclidean").value), rel=1e-4)


def test_words_are_no_patches() -> None:
    words = torch.randn(4, 12, 5)
    assert term(Words(8, 1), Words(12, 2), words, torch.ones(4, 1, 12, 12))[1] == []
