"""Which tensor of a traced output holds the logits, and what enters the layer that makes them."""

from __future__ import annotations

import copy
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
        (("out",), None, "first.2:input"),
    ],
)
def test_the_head_of_each_output(keys, select, expected):
    """The one that made it, wherever it ran; without a dropout before it."""
    found = trace(Several(keys), (torch.randn(2, 3, 9, 9),))
    logits = traced_logits(found, select)
    assert logits is not None
    assert head_input(found, logits) == expected


class TwoHeads(nn.Module):
    """Two heads on branches of their own. The last one that runs is that of ``aux``."""

    def __init__(
        self, logits: int = 5, aux: int = 3, after: Any = None, keys: tuple[Any, ...] = ("logits", "aux")
    ) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout()) for _ in range(2))
        self.head, self.other = nn.Linear(8, logits), nn.Linear(8, aux)
        self.after, self.keys = nn.ModuleList(copy.deepcopy(after or nn.Identity()) for _ in range(2)), keys

    def forward(self, x: Tensor) -> Any:
        made = self.after[0](self.head(self.one(x))), self.after[1](self.other(self.two(x)))
        if self.keys == (0, 1):
            return made
        return dict(zip(self.keys, made, strict=True))


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("keys", [("logits", "aux"), (0, 1)])
@pytest.mark.parametrize("aux", [3, 5])
@pytest.mark.parametrize("after", [None, nn.LogSoftmax(1), nn.Flatten()])
def test_heads_on_branches_of_their_own(keys, aux, after):
    found = trace(TwoHeads(aux=aux, after=after, keys=keys), (torch.randn(6, 4),))
    for select, expected in ((None, "one.2:input"), (keys[0], "one.2:input"), (keys[1], "two.2:input")):
        logits = traced_logits(found, select)
        assert logits is not None
        assert head_input(found, logits) == expected


@pytest.mark.parametrize(("aux", "expected"), [(3, "one.2:input"), (5, None)])
def test_one_module_behind_both_heads(aux, expected):
    """What ran twice tells no head, but the number of classes may."""
    net = TwoHeads(aux=aux, after=nn.LogSoftmax(1))
    net.after[1] = net.after[0]
    found = trace(net, (torch.randn(6, 4),))
    logits = traced_logits(found, "logits")
    assert logits is not None
    assert head_input(found, logits) == expected


@pytest.mark.parametrize(("aux", "expected"), [(3, "one.2:input"), (5, None)])
def test_what_code_made_may_be_of_another_head(aux, expected):
    """Of two with as many classes none is guessed, and the error asks for its name."""
    found = trace(TwoHeads(aux=aux, after=Scaled()), (torch.randn(6, 4),))
    logits = traced_logits(found, "logits")
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
