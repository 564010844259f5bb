"""Networks (B, T, C) that transpose their sequences for a part which takes (T, B, C), the default of torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_otrt import LayerPair, RepresentationTransfer, transport_distance
from lightning_otrt.reading.tracer import trace

SAMPLES, TIMES = 6, 40
X = torch.randn(SAMPLES, TIMES, 5, generator=torch.Generator().manual_seed(0))
SQUARE = torch.randn(TIMES, TIMES, 5, generator=torch.Generator().manual_seed(1))


class Convolved(nn.Module):
    """Convolutions, a recurrence, and a map at each position, as for sounds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.part = nn.Conv1d(5, width, 3, padding=1), nn.GRU(width, width)
        self.after, self.head = nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.part(self.before(x.mT).permute(2, 0, 1))
        return self.head(self.after(found.transpose(0, 1)).relu())


class Encoded(nn.Module):
    """The encoder of torch between two transpositions, with an output for each sample or each position."""

    def __init__(self, width: int, *, pooled: bool = False) -> None:
        super().__init__()
        self.before, self.pooled = nn.Linear(5, width), pooled
        self.part = nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 2, 16, 0.0), 1, enable_nested_tensor=False)
        self.after, self.head = nn.Linear(width, width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = self.part(self.before(x).transpose(0, 1)).transpose(0, 1)
        found = self.after(found).relu()
        return self.head(found.mean(1) if self.pooled else found)


class Attended(nn.Module):
    """Attention in a block that holds the transpositions."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm, self.attend = nn.LayerNorm(width), nn.MultiheadAttention(width, 2)
            self.mix = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            turned = self.norm(x).transpose(0, 1)
            return self.mix(x + self.attend(turned, turned, turned)[0].transpose(0, 1))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after, self.head = nn.Linear(5, width), self.Block(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.before(x)))


class Straight(Encoded):
    """All of it takes (T, B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.part(self.before(x))).relu())


def pooled_encoder(width: int) -> nn.Module:
    return Encoded(width, pooled=True)


CASES: list[tuple[Callable[[int], nn.Module], str, int]] = [
    (Convolved, "before", 0),
    (Convolved, "part", 1),
    (Convolved, "after", 0),
    *((make, *case) for make in (Encoded, pooled_encoder) for case in (("before", 0), ("part", 1), ("after", 0))),
    (Encoded, "part.layers.0.linear1", 1),
    *((Attended, *case) for case in (("before", 0), ("after", 0), ("after.norm", 0), ("after.mix:input", 0))),
    *((Straight, *case) for case in (("before", 1), ("part", 1), ("after", 1))),
]


@pytest.mark.parametrize("x", [X, SQUARE], ids=["", "square"])
@pytest.mark.parametrize(("make", "layer", "axis"), CASES)
def test_the_axis_of_the_samples(make: Callable[[int], nn.Module], layer: str, axis: int, x: Tensor) -> None:
    torch.manual_seed(0)
    tensor = trace(make(8), (x.transpose(0, 1) if make is Straight else x,)).tensor(layer)
    assert tensor is not None
    assert tensor.batch_axis == axis


@pytest.mark.parametrize(("make", "layer", "axis"), [case for case in CASES if ":" not in case[1]])
def test_the_term(make: Callable[[int], nn.Module], layer: str, axis: int) -> None:
    torch.manual_seed(0)
    student, teacher = make(8), make(12)
    x = X.transpose(0, 1) if make is Straight else X
    found: list[Tensor] = []
    for net in (student, teacher):
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _args: object, output: Tensor, kept: list[Tensor] = kept) -> None:
            kept.append((output[0] if isinstance(output, tuple) else output).detach())

        handle = net.get_submodule(layer).register_forward_hook(keep)
        net(x)
        handle.remove()
        tokens = kept[0].transpose(0, axis)
        channels = tokens if make is Convolved and layer == "before" else tokens.mT
        found.append(functional.adaptive_avg_pool1d(channels, 16).transpose(0, 1).flatten(1))
    transfer = RepresentationTransfer(
        teacher, [LayerPair(layer, layer)], weight=1.0, plan="exact", cost="sqeuclidean", memory=0.0
    )
    with transfer.attached(student):
        student(x)
        value = float(transfer.loss().detach())
    expected = transport_distance(*found, plan="exact", cost="sqeuclidean").value
    assert value == pytest.approx(float(expected), rel=1e-4)


def test_a_codec() -> None:
    """Encodec: convolutions with an LSTM between, which its module turns to (T, B, C)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.EncodecConfig(
        num_filters=4, hidden_size=8, upsampling_ratios=[4, 4], codebook_size=16, codebook_dim=8, num_residual_layers=1
    )
    net = transformers.EncodecModel(config)
    found = trace(net, (torch.randn(4, 1, 640),))
    for name in ("encoder", "encoder.layers.3", "encoder.layers.0"):
        tensor = found.tensor(name)
        assert tensor is not None
        assert (tensor.batch_axis, tensor.neuron_axis) == (0, 1), name


class TurnedInside(nn.Module):
    """Takes and gives (B, C, T), and transposes for a part that wants the channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.part = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.part(x.mT)[0].mT


def test_as_many_channels_as_times() -> None:
    """Nothing tells (B, C, T) from (B, T, C) there: an error, and no term along the wrong axis."""
    # Both have as many: a teacher of another width would be the reason of the error.
    nets = [nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), TurnedInside(16), TurnedInside(16)) for _ in range(2)]
    x = torch.randn(6, 4, 16).cumsum(2)
    for layer in ("1", "2"):
        transfer = RepresentationTransfer(nets[1], [LayerPair(layer, layer)])
        with transfer.attached(nets[0]), pytest.raises(ValueError, match="ambiguous neuron axis"):
            nets[0](x)
    transfer = RepresentationTransfer(nets[1], [LayerPair("1", "1", neuron_axis=1)])
    with transfer.attached(nets[0]):
        nets[0](x)
        assert transfer.loss() > 0
