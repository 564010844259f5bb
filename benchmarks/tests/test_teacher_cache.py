"""The benchmark of the cache: its floor has the same term, its steps are of the kinds it says, and its table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import teacher_cache
from benchmarks.teacher_cache import (
    AT_HAND,
    CACHED,
    LATER,
    WITHOUT,
    Pair,
    Training,
    floor_of,
    images,
    judge,
    measure,
    renewed,
    report,
    transfer_of,
)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, stride=2), nn.Conv2d(width, width, 3, stride=2)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def tiny(count: int, batch: int = 4) -> Pair:
    return Pair(Net(6).eval(), lambda: Net(4), ["first", "second"], images(count, batch, 32))


def test_the_floor_is_the_same_term() -> None:
    torch.manual_seed(0)
    pair = tiny(3)
    floor, given = floor_of(pair)
    found: dict[str, list[float]] = {}
    for name, transfer in {"floor": floor, "without": transfer_of(pair)}.items():
        with Training(pair, transfer) as training:
            for number, (inputs, _) in enumerate(pair.batches):
                given.batch = number
                training.student(*inputs.values())
                found.setdefault(name, []).append(float(transfer.loss().detach()))
    assert found["floor"] == pytest.approx(found["without"], rel=1e-5)


def test_renewed_samples_are_others() -> None:
    for batch in (tiny(1).batches[0], ({"input_ids": torch.zeros(4, 3, dtype=torch.long)}, torch.zeros(4))):
        name = next(iter(batch[0]))
        seen = {renewed(batch, number)[0][name].numpy().tobytes() for number in (-3, -2, 0, 1)}
        assert len(seen | {batch[0][name].numpy().tobytes()}) == 5


def test_all_figures() -> None:
    found = measure(tiny, 4, 2)
    assert found["steps"]["hit rates"] == dict(zip(CACHED, (0.0, 1.0, 1.0), strict=True))
    # 2 layers of 6 neurons at 4 x 4 positions, a key and a checksum.
    assert found["steps"]["bytes per sample"] == 4 * 2 * 6 * 16 + 40
    assert {len(seconds) for seconds in found["steps"]["seconds"].values()} == {4}
    assert {len(fits) for fits in found["sweep"].values()} == {teacher_cache.FITS}
    assert {len(fit) for fits in found["sweep"].values() for fit in fits} == {2}
    results: dict[str, Any] = {"command": "c", "epochs": (1, 2)}
    text = report({**results, "pairs": {"tiny": found}})
    assert text.startswith("# Teacher cache\n")
    assert len([line for line in text.split("\n") if line.startswith("| tiny |")]) == 2 + 4


def test_gates() -> None:
    seconds = {WITHOUT: [2.0, 4.4, 6.0], LATER: [1.0, 2.0, 3.0], AT_HAND: [0.9, 1.8, 2.4]}
    sweep = {"without": [[3.0, 3.0]] * 5, "with": [[6.0, 1.0], *[[1.0, 1.0]] * 4]}
    found = {"steps": {"seconds": seconds}, "sweep": sweep}
    assert [(value, passed) for _, value, _, passed in judge(found, (1, 2))] == [
        (2.0, True),
        (pytest.approx(1.111, rel=1e-3), True),
        (1.5, False),
        (2.0, False),
    ]
