"""Masks that a module keeps as an attribute, where no argument of the forward holds one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer

SAMPLES, LONGEST = 6, 9
FIRST = torch.arange(LONGEST) < torch.tensor([[3], [9], [5], [4], [7], [6]])
SERIES = seeded(0, torch.randn, SAMPLES, LONGEST, 5)
SCATTERED = seeded(1, torch.rand, SAMPLES, LONGEST) > 0.5


class Block(nn.Module):
    """Reads the mask that was set."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.kept = nn.Linear(5, width), None

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x) if self.kept is None else self.mix(x) * self.kept[..., None]


class Keeps(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block, self.head = Block(width), nn.Linear(width, 3)

    def set_mask(self, kept: Tensor) -> None:
        self.block.kept = kept

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.block(x).mean(1))


class Finds(Keeps):
    """Sets the mask in its forward."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.set_mask(x[..., 0] < 9.0)
        return super().forward(x)


def _told(student: Any, teacher: Any, *args: Tensor, kept: Tensor | None = None, **options: Any) -> list[str]:
    transfer = RepresentationTransfer(teacher, [LayerPair("block.mix", "block.mix", **options)], plan="uniform")
    for net in (student, teacher):
        if kept is not None:
            net.set_mask(kept)
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        student(*args)
        transfer.loss()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("kept", [FIRST, ~FIRST, FIRST.flip(1), FIRST.float()])
def test_a_mask_that_is_set_before(kept: Tensor) -> None:
    messages = _told(Keeps(8), Keeps(12), SERIES, kept=kept)
    for side, message in zip(("student", "teacher"), messages, strict=True):
        assert message.startswith(
            f"The attribute 'kept' of 'block' in the {side} may be the padding mask of the layers"
        )
        assert "LayerPair(mask=...)" in message
    assert _told(Keeps(8), Keeps(12), SERIES, kept=kept, mask=None) == []
    assert _told(Keeps(8), Keeps(12), SERIES, FIRST.long(), kept=kept) == []


def test_a_mask_that_the_forward_sets() -> None:
    messages = _told(Finds(8), Finds(12), SERIES.masked_fill(~FIRST[..., None], 99.0))
    assert len(messages) == 2
    assert all("The attribute 'kept' of 'block'" in text for text in messages)
    assert _told(Finds(8), Finds(12), SERIES) == []


@pytest.mark.parametrize(
    "kept",
    [
        SCATTERED,
        FIRST[:1].expand(SAMPLES, -1),
        torch.ones(SAMPLES, LONGEST),
        torch.ones(LONGEST, LONGEST).tril().bool()[:1],
        FIRST[:, :1],
    ],
    ids=["scattered", "all alike", "ones", "a row for all", "one position"],
)
def test_attributes_that_are_no_padding(kept: Tensor) -> None:
    assert _told(Keeps(8), Keeps(12), SERIES, kept=kept) == []


def test_a_causal_mask_of_as_many_tokens_as_samples() -> None:
    causal = torch.ones(SAMPLES, SAMPLES).tril()
    for kept in (causal, causal.bool(), ~causal.bool()):
        assert _told(Keeps(8), Keeps(12), SERIES[:, :SAMPLES], kept=kept) == []
