"""A normalisation over the times of (B, C, T) keeps the axis of its channels; where nothing tells, an error says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer, transport_distance
from lightning_otrt.reading.tracer import trace

TIMES = 9
X = torch.randn(6, 5, TIMES, generator=torch.Generator().manual_seed(0))


class Behind(nn.Module):
    """A normalisation right behind a convolution, and what keeps its layout."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv1d(5, width, 3, padding=1), norm(TIMES), nn.GELU()
        self.whole, self.head = nn.LayerNorm([width, TIMES]), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.whole(self.act(self.norm(self.conv(x)))).mean(2))


class Residual(Behind):
    """The same behind a sum, so that the layers around tell the axis."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.whole(self.act(self.norm(self.conv(x) + 1.0))).mean(2))


class Block(nn.Module):
    """The same inside of a module of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(5, width, 3, padding=1), nn.LayerNorm(TIMES), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(2))


class Tokens(nn.Module):
    """A normalisation over channels, behind a transposed convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm, self.mix = nn.Conv1d(5, width, 1), nn.LayerNorm(width), nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.norm(self.conv(x).mT)).mean(1))


class Mixer(nn.Module):
    """Linear maps over channels, and convolutions with a channel for each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.norm, self.mix = nn.Linear(5, width), nn.LayerNorm(width), nn.Conv1d(TIMES, TIMES, 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.mT)
        return self.head((x + self.mix(self.norm(x + 1.0))).mean(1))


class Before(nn.Module):
    """A normalisation of a series as it comes, before a convolution: of times, or of the features of tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.act, self.conv = nn.LayerNorm(TIMES), nn.ReLU(), nn.Conv1d(5, width, 3, padding=1)
        self.scale, self.head = nn.Parameter(torch.ones(1)), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.act(self.norm(x * self.scale))).mean(2))


class Maps(nn.Module):
    """A normalisation over the columns of a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, width, 3, padding=1), nn.RMSNorm(TIMES), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x[:, None])).mean((2, 3)))


KNOWN: list[tuple[Callable[[int], nn.Module], str, int]] = [
    *((Behind, layer, 1) for layer in ("norm", "norm:input", "act", "whole", "whole:input")),
    (lambda width: Behind(width, nn.RMSNorm), "norm", 1),
    *((Residual, layer, 1) for layer in ("norm", "norm:input", "act", "whole")),
    *((Block, layer, 1) for layer in ("body", "body.1", "body.2", "body.2:input")),
    *((Tokens, layer, 2) for layer in ("norm", "norm:input", "mix")),
    *((Mixer, layer, 2) for layer in ("embed", "norm", "norm:input")),
    (Mixer, "mix", 1),  # one channel for each token is what a convolution gives
    (Maps, "norm", 1),
]


#: With as many channels as times nothing tells the two apart behind a sum.
ALIKE = [(make, layer, None if make is Residual and "whole" not in layer else axis) for make, layer, axis in KNOWN]


@pytest.mark.parametrize(
    ("make", "layer", "axis", "width"), [*((*case, 4) for case in KNOWN), *((*case, TIMES) for case in ALIKE)]
)
def test_the_axis(make: Callable[[int], nn.Module], layer: str, axis: int | None, width: int) -> None:
    tensor = trace(make(width), (X,)).tensor(layer)
    assert tensor is not None
    assert tensor.neuron_axis == axis


@pytest.mark.parametrize("layer", ["norm", "act", "act:input", "norm:input"])
def test_where_nothing_tells_an_error_does(layer: str) -> None:
    with pytest.raises(ValueError, match="ambiguous neuron axis"):
        term(Before(4), Before(6), LayerPair(layer, layer))


def term(student: nn.Module, teacher: nn.Module, pair: LayerPair) -> float:
    transfer = RepresentationTransfer(teacher, [pair], weight=1.0, plan="exact", memory=0.0, grid=3)
    with transfer.attached(student):
        student(X)
        return float(transfer.loss().detach())


@pytest.mark.parametrize("make", [Behind, Residual])
def test_the_term_is_that_of_channels(make: type[Behind]) -> None:
    torch.manual_seed(0)
    student, teacher = make(4), make(7)
    shift = 1.0 if make is Residual else 0.0
    with torch.no_grad():
        ys, xs = (net.norm(net.conv(X) + shift).transpose(0, 1).flatten(1) for net in (student, teacher))
    expected = transport_distance(ys, xs, plan="exact").value
    assert term(student, teacher, LayerPair("norm", "norm")) == pytest.approx(float(expected), rel=1e-4)
