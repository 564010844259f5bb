"""What a traced forward notes: order, calls, where tensors come from, and the axes of neurons and samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_otrt.layers.resolve import resolve_layers
from lightning_otrt.reading.tracer import trace


def test_hooks_of_users_run_in_evaluation_mode_and_stay():
    def halve(module, args, output):
        assert not module.training
        return output[:, :2]

    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9))
    handle = model[1].register_forward_hook(halve)
    assert trace(model, (torch.randn(2, 4),)).output_shapes == ((2, 2),)
    assert len(model[1]._forward_hooks) == 1
    handle.remove()


def test_order_calls_and_modules_that_did_not_run():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(4, 4)
            self.second, self.first = nn.Linear(4, 4), nn.Linear(4, 4)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.second(self.relu(self.first(x))))

    seen = trace(Branches(), (torch.randn(2, 4),))
    assert [layer.name for layer in seen.layers] == ["", "unused", "second", "first", "relu"]
    assert [(layer.calls, layer.order) for layer in seen.layers[1:4]] == [(0, None), (1, 2), (1, 0)]
    assert seen.layer("relu").calls == 2
    assert [layer.name for layer in seen.recordable()] == ["first", "second"]
    assert (seen.layer("relu").input_from, seen.layer("second").input_from) == ("second", "relu")
    assert seen.layer("unused").output_shape is None


def test_root_and_inputs():
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
            self.metric = nn.Linear(1, 1)

    seen = trace(Task(), (), {"input": torch.randn(5, 3, 8, 6)}, root="net")
    assert (seen.root, seen.batch_size) == ("net", 5)
    assert seen.layer("net.1").gives_model_output
    assert (seen.layer("").calls, seen.layer("metric").calls) == (0, 0)
    tokens = trace(nn.Embedding(9, 4), (torch.randint(0, 9, (2, 3)),))
    assert tokens.batch_size == 2
    with pytest.raises(ValueError, match="No module 'nett' in Task to run. Its children: 'net', 'metric'"):
        trace(Task(), (), root="nett")


def test_a_module_with_two_names_is_traced_once():
    model = nn.Module()
    model.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.again = model.net[0]
    seen = trace(model, (torch.randn(2, 4),), root="net")
    assert seen.aliases == (("again", "net.0"),)
    assert (seen.layer("again").name, seen.layer("again").calls) == ("net.0", 1)
    assert trace(model, (torch.randn(2, 4),), root="again").root == "again"


def test_what_a_container_returns_comes_from_its_last_child():
    seen = trace(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Identity()), (torch.randn(2, 4),))
    assert {layer.name: layer.output_from for layer in seen.layers} == {
        "": "1",
        "0": "0.1",
        "0.0": "0.0",
        "0.1": "0.1",
        "1": "1",
    }


def test_recomputation_in_a_backward_inside_the_forward_is_no_second_call():
    class Penalised(nn.Module):
        """Takes a gradient in its forward, as networks that follow an energy do."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = checkpoint(self.layer, x, use_reentrant=False)
                return torch.autograd.grad(y.square().sum(), x)[0]

    assert trace(Penalised(), (torch.randn(2, 4),)).layer("layer").calls == 1


def test_a_compiled_part_is_watched():
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), backend=backend)
    model = nn.Sequential(compiled, nn.Linear(4, 2))
    x = torch.randn(2, 4)
    model(x)
    before = len(compilations)
    assert [layer.name for layer in trace(model, (x,)).recordable()] == ["0.0", "0.1", "0", "1"]
    assert len(compilations) == before > 0
    torch.compiler.reset()


def test_activations_are_not_kept():
    alive = []

    class Big(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            import weakref

            alive.append(sum(reference() is not None for reference in references))
            y = x + 1
            references.append(weakref.ref(y))
            return y

    references: list = []
    trace(nn.Sequential(Big(), Big(), Big(), Big()), (torch.randn(2, 2),))
    assert max(alive) <= 1


class Residual(nn.Module):
    """A block whose output no module returns."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Permute(nn.Module):
    """To channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class Scale(nn.Module):
    """A layer of unknown type that keeps the shape."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class ConvNext(nn.Module):
    """A block in which both layouts occur."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerNorm2d(nn.LayerNorm):
    """As in torchvision and timm: channels first in spite of its base."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerNorm(nn.Module):
    """Over axis 1, as in speech synthesis and image restoration, or over the last one."""

    def __init__(self, width: int, axis: int = 1) -> None:
        super().__init__()
        self.gamma, self.axis = nn.Parameter(torch.ones(width)), axis

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(self.axis, -1)
        return (nn.functional.layer_norm(x, (x.shape[-1],)) * self.gamma).transpose(self.axis, -1)


IMAGE = (2, 6, 8, 8)
CUBE = (2, 8, 8, 8)
AXES = [
    (nn.Conv2d(6, 8, 1), IMAGE, "", 1),
    (nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU()), IMAGE, "1", 1),
    (nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(inplace=True)), IMAGE, "1", 1),
    (nn.Sequential(nn.Conv2d(6, 8, 1), nn.Dropout(), nn.Identity()), IMAGE, "2", 1),
    (nn.Sequential(nn.Conv2d(6, 9, 1), Scale()), IMAGE, "1", 1),
    (nn.Sequential(nn.Conv2d(6, 8, 1), Scale()), IMAGE, "1", None),
    (nn.Sequential(nn.Conv2d(6, 8, 1), Permute()), IMAGE, "1", None),
    (nn.Sequential(nn.Conv2d(6, 8, 1), Permute(), nn.LayerNorm(8)), IMAGE, "2", 3),
    (nn.Sequential(nn.Conv2d(6, 8, 1), LayerNorm2d(8)), IMAGE, "1", 1),
    (nn.Sequential(Residual(nn.Conv2d(6, 6, 1)), LayerNorm(6)), IMAGE, "1", 1),
    # As many channels as rows and columns: what runs around it tells.
    (nn.Sequential(Residual(nn.Conv2d(8, 8, 1)), LayerNorm(8)), CUBE, "1", 1),
    (nn.Sequential(Residual(nn.Linear(8, 8)), LayerNorm(8, -1)), (2, 8, 8), "1", 2),
    (nn.Sequential(nn.Conv1d(8, 8, 1), LayerNorm(8)), (2, 8, 8), "1", 1),
    (nn.Sequential(LayerNorm(8)), (2, 8, 8), "0", None),
    (nn.GroupNorm(2, 6), IMAGE, "", 1),
    (nn.MaxPool2d(2), IMAGE, "", 1),
    (nn.LayerNorm([6, 8, 8]), IMAGE, "", None),
    (nn.Sequential(nn.ReLU()), IMAGE, "", None),
    (Residual(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()), IMAGE, "", 1),
    (Residual(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), (2, 5, 8), "", 2),
    (nn.Sequential(Residual(nn.Linear(8, 8)), nn.GELU()), (2, 5, 8), "1", 2),
    (ConvNext(6), IMAGE, "", 1),
    (ConvNext(8), CUBE, "", 1),
    (Residual(nn.Conv2d(8, 8, 3, padding=1)), CUBE, "", 1),
    (Residual(nn.Linear(8, 8)), CUBE, "", 3),
    (nn.Conv1d(6, 4, 3), (2, 6, 9), "", 1),
    (nn.Conv3d(3, 4, 3), (2, 3, 5, 5, 5), "", 1),
    (nn.LSTM(6, 8, batch_first=True), (2, 5, 6), "", 2),
    (nn.Linear(6, 8), (2, 6), "", 1),
    (nn.Sequential(nn.Flatten()), IMAGE, "0", 1),
]


@pytest.mark.parametrize(("model", "shape", "layer", "axis"), AXES, ids=[f"{i}" for i in range(len(AXES))])
def test_neuron_axis(model, shape, layer, axis):
    assert trace(model, (torch.randn(shape),)).layer(layer).neuron_axis == axis


def test_neuron_axis_of_a_concatenation():
    class Fire(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.b(x)], 1)

    assert trace(Fire(), (torch.randn(IMAGE),)).layer("").neuron_axis == 1


def test_neuron_axis_of_inputs():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU()), nn.Dropout(), Permute(), Residual(nn.Linear(8, 8)), nn.ReLU()
    )
    seen = trace(model, (torch.randn(IMAGE),))
    inputs = {name: seen.layer(name).input for name in ("0", "0.1", "1", "2", "3", "3.inner", "4")}
    axes = {name: tensor.neuron_axis for name, tensor in inputs.items() if tensor}
    assert axes == {
        "0": 1,
        "0.1": 1,
        "1": 1,
        "2": 1,
        "3": 3,
        "3.inner": 3,
        "4": 3,
    }


class TimeFirst(nn.Module):
    """A transformer of torch's default layout (T, B, C)."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.norm(self.encoder(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x.mean(1 if self.batch_first else 0)


@pytest.mark.parametrize("tokens", [4, 5])
@pytest.mark.parametrize("batch_first", [True, False])
def test_batch_axis(batch_first, tokens):
    seen = trace(TimeFirst(batch_first), (torch.randn(4, tokens, 8),))
    expected = 0 if batch_first else 1
    for name in ("encoder.layers.0", "encoder.layers.0.linear1", "encoder", "norm", "attention"):
        assert (seen.layer(name).batch_axis, seen.layer(name).neuron_axis) == (expected, 2), name
    assert seen.layer("attention").output_kind == f"tuple(float32 {tuple(seen.layer('attention').output_shape)}, None)"
    assert [pair.student for pair in resolve_layers("blocks", seen, seen)] == ["encoder.layers.0", "encoder.layers.1"]


def test_prefix_tokens():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    model[0].reg_token = nn.Parameter(torch.zeros(1, 3, 4))
    model[0].pos_embed = nn.Parameter(torch.zeros(1, 9, 4))
    assert trace(model, (torch.randn(2, 4),)).prefix_tokens == 4
