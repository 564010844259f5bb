"""Which layers have axes of their own: behind a pointwise nonlinearity, by type or by value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.layers.streams import choose_plans, has_own_axes
from lightning_otrt.reading.traced.batch_facts import is_rectified
from lightning_otrt.reading.tracer import trace


class Functions(nn.Module):
    """Nonlinearities by functions, where no type tells."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.inner = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


class Residual(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(6, 6), nn.ReLU()
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.act(self.layer(x)))


class Several(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"stream": x, "hidden": x.relu()}


def own_axes(model: nn.Module, name: str, *shape: int) -> bool:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return has_own_axes(trace(model, (torch.randn(shape or (32, 6)),), values=True), name)


@pytest.mark.parametrize("activation", [
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
    nn.Softsign, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanhshrink,
])  # fmt: skip
def test_modules_that_are_nonlinear(activation: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(6, 16), activation(), nn.Dropout(), nn.Linear(16, 4))
    seen = {name: own_axes(net, name) for name in ("0", "1", "2", "3:input", "3")}
    assert seen == {"0": False, "1": True, "2": True, "3:input": True, "3": False}


@pytest.mark.parametrize(("function", "expected"), [
    (F.relu, True), (F.gelu, True), (F.silu, True), (F.hardswish, True), (lambda x: F.relu(x, inplace=True), True),
    (lambda x: 2 * x + 1, False), (lambda x: x, False),
])  # fmt: skip
def test_functions_by_their_values(function: object, expected: bool) -> None:
    net = Functions(function)
    assert own_axes(net, "") is expected
    assert not own_axes(net, "inner")


def test_containers() -> None:
    """What a container returns is told by the module that made it."""
    for last, expected in ((nn.Tanh(), True), (nn.Identity(), False), (nn.LayerNorm(6), False)):
        assert own_axes(nn.Sequential(Residual(last)), "0") is expected

    class ConvNormActivation(nn.Sequential):
        """Its name is no word for what it does."""

    bottleneck = ConvNormActivation(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))
    net = nn.Sequential(bottleneck, nn.AvgPool2d(2), nn.Conv2d(5, 4, 1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten())
    seen = {name: own_axes(net, name, 8, 3, 8, 8) for name in ("0", "1", "3", "4", "5")}
    assert seen == {"0": False, "1": False, "3": True, "4": True, "5": True}


def test_transformers_and_recurrent_networks() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
    assert not own_axes(nn.Sequential(layer), "0", 4, 5, 6)
    assert own_axes(nn.Sequential(nn.LSTM(6, 4, batch_first=True)), "0", 4, 5, 6)


def test_parts_of_an_output() -> None:
    seen = trace(nn.Sequential(Several()), (torch.randn(8, 6),), values=True)
    assert [has_own_axes(seen, "0", key) for key in ("stream", "hidden")] == [False, True]


def test_both_sides_have_to_have_axes() -> None:
    seen = trace(nn.Sequential(nn.Linear(6, 16), nn.Tanh()), (torch.randn(8, 6),), values=True)
    pairs = [LayerPair(student, teacher) for student in "01" for teacher in "01"]
    assert choose_plans(pairs, seen, seen) == ("orthogonal", "orthogonal", "orthogonal", "sinkhorn")


def test_values() -> None:
    normal = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for values, expected in [
        (normal, False), (-normal.relu(), False), (normal + 0.5, False), (0.01 * normal, False),
        (torch.zeros(3), False),
        (normal.relu(), True), (F.gelu(3 * normal), True), (F.silu(normal), True), (normal.sigmoid(), True),
        (normal.relu().bfloat16(), True), (torch.full((3,), torch.nan), False),
    ]:  # fmt: skip
        assert is_rectified(values) is expected
    nested = torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(4, 3)], layout=torch.jagged)
    assert is_rectified(nested)


def test_a_trace_looks_only_if_asked() -> None:
    layer = trace(nn.ReLU(), (torch.randn(4, 3),)).layer("")
    assert layer.output is not None
    assert layer.output.is_rectified is None
