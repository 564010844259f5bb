"""A forward that takes the whole batch as one argument: its mask is found in mappings and in objects alike."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer, compare_representations, neurons


@dataclass
class Record:
    ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class Frozen:
    ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True, slots=True)
class FrozenSlots:
    ids: Tensor
    attention_mask: Tensor


class Pair(NamedTuple):
    ids: Tensor
    attention_mask: Tensor


class Plain:
    def __init__(self, ids: Tensor, attention_mask: Tensor) -> None:
        self.ids, self.attention_mask = ids, attention_mask


class Slots:
    __slots__ = ("attention_mask", "ids")

    def __init__(self, ids: Tensor, attention_mask: Tensor) -> None:
        self.ids, self.attention_mask = ids, attention_mask


def as_mapping(ids: Tensor, attention_mask: Tensor) -> UserDict[str, Tensor]:
    return UserDict(ids=ids, attention_mask=attention_mask)


def as_namespace(ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
    return SimpleNamespace(ids=ids, attention_mask=attention_mask)


BATCHES = [Record, Frozen, FrozenSlots, Pair, Plain, Slots, as_mapping, as_namespace]


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(2))

    def forward(self, batch: Any) -> Tensor:
        read = batch.__getitem__ if isinstance(batch, UserDict) else partial(getattr, batch)
        ids, mask = read("ids"), read("attention_mask")
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def values() -> tuple[Tensor, Tensor]:
    mask = (torch.arange(24) < seeded(4, torch.randint, 4, 24, (8, 1))).long()
    return seeded(5, torch.randint, 50, (8, 24)), mask


def right() -> float:
    """The identity plan by hand, on valid tokens."""
    ids, mask = values()
    found = []
    for net in networks():
        x = net.blocks[1](net.blocks[0](net.embed(ids)))
        y = neurons(x.detach().double(), mask=mask, neuron_axis=-1)
        y = y - y.mean(1, keepdim=True)
        found.append(y / y.norm(dim=1, keepdim=True))
    return float((1 - (found[0] * found[1]).sum(1)).mean())


def networks() -> tuple[Net, Net]:
    return seeded(1, Net, 16), seeded(2, Net, 16)


@pytest.mark.parametrize("mask", ["auto", "attention_mask"])
@pytest.mark.parametrize("batch", BATCHES)
def test_mask_in_a_batch(batch: Any, mask: str) -> None:
    student, teacher = networks()
    transfer = RepresentationTransfer(
        teacher, [LayerPair("blocks.1", "blocks.1", mask=mask)], plan="identity", weight=1.0
    )
    with transfer.attached(student):
        for _ in range(2):
            student(batch(*values()))
            loss = transfer.loss()
    assert float(loss.detach()) == pytest.approx(right(), rel=1e-4)


@pytest.mark.parametrize("batch", [Record, Frozen, FrozenSlots, Pair, as_mapping])
def test_teacher_of_another_type_gets_the_batch_in_its_own(batch: Any) -> None:
    student, teacher = networks()
    transfer = RepresentationTransfer(
        teacher.double(), [LayerPair("blocks.1", "blocks.1", mask="attention_mask")], plan="identity", weight=1.0
    )
    ids, mask = values()
    with transfer.attached(student):
        student(batch(ids, mask.float()))
        loss = transfer.loss()
    assert float(loss.detach()) == pytest.approx(right(), rel=1e-4)


@pytest.mark.parametrize("batch", [Record, Pair])
def test_mask_in_a_batch_that_is_compared(batch: Any) -> None:
    networks_, given = networks(), batch(*values())
    found = compare_representations(
        *networks_, [given], layers=["blocks.1"], progress=False, plan="identity", inputs=lambda b: (b,)
    )
    assert float(found.distances[0, 0]) == pytest.approx(right(), rel=1e-3)
