"""Extra forwards leave the states that a student keeps: hidden states, caches of keys, cached weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forwards.masked import VALID, WORDS
from forwards.masked_terms import run
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from lightning_otrt import RepresentationTransfer


class Stateful(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn, self.head, self._state = nn.GRU(4, width, batch_first=True), nn.Linear(width, 3), None

    def forward(self, x: Tensor) -> Tensor:
        found, state = self.rnn(x, self._state)
        self._state = state.detach()
        return self.head(found[:, -1])


def test_hidden_state() -> None:
    student, x = Stateful(8), torch.randn(8, 5, 4)
    expected = copy.deepcopy(student)(x).detach()
    transfer = RepresentationTransfer(Stateful(12), {"rnn": "rnn"})
    with transfer.attached(student):
        torch.testing.assert_close(student(x).detach(), expected)
        transfer.loss()


class Store:
    """Holds objects that hold tensors, as a cache of keys and values does."""

    def __init__(self) -> None:
        self.layers = [SimpleNamespace(keys=torch.zeros(8, 0, 4))]
        self.inner = SimpleNamespace(calls=[])


class Caching(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, x: Tensor, store: Any) -> Tensor:
        store.layers[0].keys = torch.cat([store.layers[0].keys, x[:, None]], 1)
        store.inner.calls.append(1)
        return self.head(self.mix(store.layers[0].keys.sum(1)).relu())


def test_cache_of_keys() -> None:
    student, store, x = Caching(8), Store(), torch.randn(8, 4)
    expected = student(x, Store()).detach()
    transfer = RepresentationTransfer(Caching(12), {"mix": "mix"})
    with transfer.attached(student):
        torch.testing.assert_close(student(x, store).detach(), expected)
        transfer.loss()
    assert store.layers[0].keys.shape[1] == len(store.inner.calls) == 1


def test_cached_weights() -> None:
    student = nn.Sequential(weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3))
    transfer = RepresentationTransfer(nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)), "penultimate")
    with transfer.attached(student), parametrize.cached():
        student(torch.randn(8, 4))
        transfer.loss().backward()
    assert all(parameter.grad is not None for parameter in student[0].parameters())


class Whole(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, width), nn.Linear(width, width)

    def forward(self, batch: dict[str, Tensor], flag: bool = True) -> Tensor:
        return self.mix(self.embed(batch["words"]))


def test_a_mapping_beside_another_argument() -> None:
    student, teacher = Whole(8), Whole(12)
    batch = {"words": WORDS, "attention_mask": VALID}
    assert run(student, teacher, (batch, False)) == pytest.approx(run(student, teacher, (batch,)))
