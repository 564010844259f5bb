"""Networks that take (T, B, ...) and have no `batch_first` inside: samples are what does not mix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer
from lightning_otrt.reading.tracer import trace


class Loop(nn.Module):
    """A recurrence over the first axis, or over the second one."""

    def __init__(self, width: int = 8, *, axis: int = 0, pooled: bool = False) -> None:
        super().__init__()
        self.step, self.mix, self.axis, self.pooled = nn.Linear(5, width), nn.Linear(width, width), axis, pooled

    def forward(self, x: Tensor) -> Tensor:
        found = self.mix(self.step(x).cumsum(self.axis).tanh())
        return found.mean(self.axis) if self.pooled else found


class Attention(nn.Module):
    """Each position sees all of its own sample, without an order."""

    def __init__(self, width: int = 8, *, axis: int = 0) -> None:
        super().__init__()
        self.embed, self.key, self.mix, self.axis = (
            nn.Embedding(20, width),
            nn.Linear(width, width),
            nn.Linear(width, width),
            axis,
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(0, self.axis ^ 1) if self.axis == 0 else self.embed(ids)
        x = torch.softmax(x @ self.key(x).mT, -1) @ x
        return self.mix(x.transpose(0, 1) if self.axis == 0 else x)


class Cells(nn.Module):
    """A cell of torch over time, with a mask (B, T) or (T, B) beside."""

    def __init__(self, width: int = 8, *, axis: int = 0) -> None:
        super().__init__()
        self.cell, self.mix, self.axis = nn.GRUCell(5, width), nn.Linear(width, width), axis

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        state, found = None, []
        for entered, kept in zip(x.unbind(self.axis), keep.unbind(keep.shape.index(x.shape[self.axis])), strict=True):
            state = self.cell(entered, state)
            found.append(state * kept[:, None])
        return self.mix(torch.stack(found, self.axis))


class Pointwise(nn.Module):
    """Nothing mixes, so that nothing tells."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.mix = nn.Linear(5, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


X, IDS = torch.randn(6, 4, 5), torch.randint(20, (6, 4))
SQUARE = torch.randn(6, 6, 5)
CASES: dict[str, tuple[Any, tuple[Tensor, ...], str, int]] = {
    "loop over time first": (Loop, (X,), "mix", 1),
    "loop over time second": (lambda width: Loop(width, axis=1), (X,), "mix", 0),
    "loop, square": (Loop, (SQUARE,), "mix", 1),
    "loop over the second, square": (lambda width: Loop(width, axis=1), (SQUARE,), "mix", 0),
    "loop, pooled": (lambda width: Loop(width, pooled=True), (X,), "step", 1),
    "loop over the second, pooled": (lambda width: Loop(width, axis=1, pooled=True), (X,), "step", 0),
    "attention over the first": (Attention, (IDS,), "mix", 1),
    "attention over the second": (lambda width: Attention(width, axis=1), (IDS,), "mix", 0),
    "cells": (Cells, (X, torch.ones(6, 4)), "mix", 1),
    "cells, a mask of samples first": (Cells, (X, torch.ones(4, 6)), "mix", 1),
    "cells over the second": (lambda width: Cells(width, axis=1), (X, torch.ones(6, 4)), "mix", 0),
    "pointwise": (Pointwise, (X,), "mix", 0),
}


@pytest.mark.parametrize("name", CASES)
def test_axis_of_the_samples(name: str) -> None:
    build, args, layer, axis = CASES[name]
    traced = trace(build(8), args)
    assert traced.layer(layer).batch_axis == axis
    assert traced.batch_size == args[0].shape[axis]


@pytest.mark.parametrize("name", CASES)
def test_term(name: str) -> None:
    """Against positions that are averaged by hand, one sample at a time."""
    build, args, layer, axis = CASES[name]
    student, teacher = build(8), build(12)
    transfer = RepresentationTransfer(teacher, {layer: layer}, plan="uniform", weight=1.0, grid=1)
    with transfer.attached(student):
        student(*args)
        found = float(transfer.loss().detach())
    rows = []
    for net in (student, teacher):
        kept: list[Tensor] = []
        handle = getattr(net, layer).register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))
        net(*args)
        handle.remove()
        rows.append(kept[0].detach().mean(1 - axis).T)
    expected = (1 - torch.corrcoef(torch.cat(rows))[:8, 8:]).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)


class Positions(nn.Module):
    """Numbers of positions come in beside, as many as there are samples."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.mix = nn.Linear(5, width)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.mix(x + positions[None, :, None])


def test_positions_beside_samples() -> None:
    assert trace(Positions(), (SQUARE, torch.randn(6))).layer("mix").batch_axis == 0


def hugging_face() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2Model(transformers.GPT2Config(**sizes))


@pytest.mark.parametrize(
    ("build", "args"),
    [
        (lambda: nn.Conv2d(3, 4, 3), (torch.randn(4, 3, 8, 8),)),
        (lambda: nn.Linear(5, 4), (torch.randn(4, 5),)),
        (lambda: nn.TransformerEncoderLayer(5, 1, 8), (X,)),
        (hugging_face, (IDS,)),
    ],
)
def test_where_something_tells_it_runs_once(
    build: Any, args: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, calls = build(), []
    forward = type(net).forward
    monkeypatch.setattr(type(net), "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    trace(net, args)
    assert len(calls) == 1


@pytest.mark.parametrize("x", [X, SQUARE])
def test_a_cache_of_samples_is_refused(x: Tensor) -> None:
    student = Loop(8)
    transfer = RepresentationTransfer(Loop(12), {"mix": "mix"}, teacher_cache="memory")
    with transfer.attached(student), pytest.raises(ValueError, match="`teacher_cache` cannot be used"):
        student(x)


class Scores(nn.Module):
    """Compares all queries with all documents: each score depends on two samples."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.queries, self.documents = nn.Embedding(20, width), nn.Embedding(20, width)
        self.mix = nn.Linear(width, width)

    def forward(self, queries: Tensor, documents: Tensor) -> Tensor:
        return self.queries(queries).mean(1) @ self.mix(self.documents(documents)).mean(1).T


@pytest.mark.parametrize("lengths", [(12, 12), (7, 12), (12, 7)])
def test_scores_of_all_samples_with_all(lengths: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = tuple(torch.randint(20, (6, length), generator=generator) for length in lengths)
    found = trace(Scores(), batch)
    assert found.batch_size == 6
    assert [found.tensor(name).batch_axis for name in ("queries", "documents", "mix")] == [0, 0, 0]
