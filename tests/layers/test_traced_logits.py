"""Which tensor of a traced output holds the logits, and what enters the layer that makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt.layers.traced_logits import head_input, logit_key, traced_logits
from lightning_otrt.reading.tracer import trace


class Several(nn.Module):
    """Two dense heads, which run in the order of their names, and an output that lists them in either order."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.body, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()
        self.first = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 1))
        self.second = nn.Conv2d(8, 4, 1)
        self.keys = keys

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.act(self.body(x))
        found = {"out": self.first(x), "aux": self.second(x)}
        return {key: found[key] for key in self.keys}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["loss", "logits"], "logits"),
        (["out", "aux"], "out"),
        ([0, 1], 0),
        ([1], None),
        (["boxes"], None),
        ([], None),
        (["out", "logits"], "logits"),
    ],
)
def test_key(keys: list[Any], expected: str | int | None) -> None:
    assert logit_key(keys) == expected


@pytest.mark.parametrize(
    ("keys", "select", "expected"),
    [
        (("out", "aux"), None, "first.2:input"),
        (("out", "aux"), "aux", "second:input"),
        (("out",), None, "second:input"),
    ],
)
def test_the_head_of_each_output(keys, select, expected):
    """With one output and two heads the last is taken; without a dropout before it."""
    found = trace(Several(keys), (torch.randn(2, 3, 9, 9),))
    logits = traced_logits(found, select)
    assert logits is not None
    assert head_input(found, logits) == expected


def test_none_is_shown():
    found = trace(Several(("aux",)), (torch.randn(2, 3, 9, 9),))
    assert traced_logits(found, None) is None
    assert traced_logits(found, "boxes") is None


@pytest.mark.parametrize(
    ("net", "shape", "expected"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (5, 4), "2:input"),
        (nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3)), (5, 4), "1:input"),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (5, 6, 4), "2:input"),
        (nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 3, 1)), (5, 4, 9), "2:input"),
        (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), (5, 4), None),
    ],
)
def test_the_head_of_one_output(net, shape, expected):
    found = trace(net, (torch.randn(shape),))
    logits = traced_logits(found, None)
    assert logits is not None
    assert head_input(found, logits) == expected
