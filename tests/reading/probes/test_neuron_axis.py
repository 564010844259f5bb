"""Neuron axes where two axes have the same size, and a module may move them behind its last layer."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers
from helpers import seeded
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import InformerConfig, InformerModel

from lightning_otrt import LayerPair, LogitDistillation, RepresentationTransfer, neurons
from lightning_otrt.layers.automatic import block_candidates
from lightning_otrt.reading.tracer import trace

SIZE = 8


class Moved(nn.Module):
    """A linear layer or a convolution, and what a forward does behind it."""

    def __init__(self, layer: nn.Module, behind) -> None:
        super().__init__()
        self.layer, self.behind = layer, behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.layer(x), x)


class Attention(nn.Module):
    """Mixes all positions behind its last layer, and may transpose."""

    def __init__(self, *, transposes: bool) -> None:
        super().__init__()
        self.qkv, self.transposes = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(3)), transposes

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in self.qkv)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return mixed.mT if self.transposes else mixed


class MixedOutputs(nn.Module):
    """Returns the sequence in both layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.layer(x)
        return {"last": x.tanh(), "first": x.tanh().mT}


def linear() -> nn.Module:
    return nn.Linear(SIZE, SIZE)


def conv() -> nn.Module:
    return nn.Conv2d(SIZE, SIZE, 3, padding=1)


SEQUENCE, MAP = (4, SIZE, SIZE), (4, SIZE, SIZE, SIZE)
CASES = {
    "as it is": (Moved(linear(), lambda y, x: y.relu()), SEQUENCE, 2),
    "transposed": (Moved(linear(), lambda y, x: y.relu().mT), SEQUENCE, None),
    "transposed and normalised": (Moved(linear(), lambda y, x: functional.layer_norm(y, (SIZE,)).mT), SEQUENCE, None),
    "transposed around the layer": (Moved(linear(), lambda y, x: x + y.mT), SEQUENCE, None),
    "sum": (Moved(linear(), lambda y, x: x + y), SEQUENCE, 2),
    "copied": (Moved(linear(), lambda y, x: y.mT.contiguous()), SEQUENCE, None),
    "pooled": (Moved(nn.Linear(SIZE, SIZE), lambda y, x: functional.avg_pool1d(y.mT, 2)), (4, 2 * SIZE, SIZE), None),
    "attention": (Attention(transposes=False), SEQUENCE, 2),
    "attention, transposed": (Attention(transposes=True), SEQUENCE, None),
    "map": (Moved(conv(), lambda y, x: y.relu() + x), MAP, 1),
    "map to channels last": (Moved(conv(), lambda y, x: y.permute(0, 2, 3, 1)), MAP, None),
    "map from channels last": (Moved(linear(), lambda y, x: y.permute(0, 3, 1, 2)), MAP, None),
    "map with turned sides": (Moved(conv(), lambda y, x: y.mT + x), MAP, 1),
    "map in groups": (Moved(conv(), lambda y, x: functional.group_norm(y, 2).movedim(1, 3)), MAP, None),
    "parts": (Moved(conv(), lambda y, x: torch.cat([y[:, :4], x[:, :4]], 1).movedim(1, 3)), MAP, None),
    "patches": (PatchEmbed(None, 2, 3, SIZE, flatten=False, output_fmt="NHWC"), (4, 3, 2 * SIZE, 2 * SIZE), None),
}


@pytest.mark.parametrize("name", CASES)
def test_axis_behind_the_last_layer(name: str) -> None:
    model, shape, axis = CASES[name]
    found = trace(nn.Sequential(model), (seeded(0, torch.randn, shape),)).layer("0")
    assert found.neuron_axis == axis


def test_each_tensor_of_an_output_has_its_own_axis() -> None:
    parts = dict(trace(nn.Sequential(MixedOutputs()), (seeded(0, torch.randn, SEQUENCE),)).layer("0").parts)
    assert {key: part.neuron_axis for key, part in parts.items()} == {"last": 2, "first": None}


@pytest.mark.parametrize("behind", [lambda y, x: y @ y.mT, lambda y, x: torch.zeros_like(y)])
def test_what_shows_no_axis_is_not_known(behind) -> None:
    model = nn.Sequential(Moved(linear(), behind))
    assert trace(model, (seeded(0, torch.randn, SEQUENCE),)).layer("0").neuron_axis is None


class CountLinear(TorchFunctionMode):
    """Counts linear layers that run."""

    calls, counted = 0, functional.linear

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += function is self.counted
        return function(*args, **kwargs or {})


class CountConvolutions(CountLinear):
    """Counts convolutions."""

    counted = functional.conv2d


@pytest.mark.parametrize(("tokens", "runs"), [(7, 3), (5, 8)])
def test_distinct_sizes_cost_no_forward(tokens: int, runs: int) -> None:
    """The others are two more of the network, one of them a second trace, and three of the module."""
    model = nn.Sequential(Moved(nn.Linear(6, 5), lambda y, x: y.relu()))
    with CountLinear() as count:
        trace(model, (torch.randn(4, tokens, 6),))
    assert count.calls == runs


@pytest.mark.parametrize(("channels", "runs"), [(5, 1), (8, 6)])
def test_square_maps_cost_no_forward(channels: int, runs: int) -> None:
    """Rows and columns may be as many: only where the channels are as many, too, they may have changed places."""
    model = nn.Sequential(Moved(nn.Conv2d(3, channels, 1), lambda y, x: y.relu()))
    with CountConvolutions() as count:
        trace(model, (torch.randn(4, 3, 8, 8),))
    assert count.calls == runs


def right(student: nn.Module, teacher: nn.Module, x: Tensor, axis: int, read) -> float:
    """1 - r of each neuron with the one of its number, in float64."""
    values = []
    for net in (student, teacher):
        y = neurons(read(net, x).double(), neuron_axis=axis)
        y = y - y.mean(1, keepdim=True)
        values.append(y / y.norm(dim=1, keepdim=True))
    return float((1 - (values[0] * values[1]).sum(1)).mean())


def term(student: nn.Module, teacher: nn.Module, layer: str, *args, **kwargs) -> float:
    transfer = RepresentationTransfer(teacher, [LayerPair(layer, layer)], plan="identity", memory=0.0)
    with transfer.attached(student):
        student(*args, **kwargs)
        transfer.loss()
    return float(transfer.transport_value)


def captured(net: nn.Module, layer: str, *args, **kwargs) -> Tensor:
    found = []
    handle = net.get_submodule(layer).register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        net(*args, **kwargs)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("width", [SIZE * 2, SIZE * 2 + 8])
def test_mambaout(width: int) -> None:
    def build() -> nn.Module:
        return timm.create_model("mambaout_femto", dims=(8, width, 32, 48), depths=(1, 1, 1, 1), num_classes=3).eval()

    student, teacher, x = seeded(1, build), seeded(2, build), seeded(3, torch.randn, 4, 3, 128, 128)
    layer = "stages.1.downsample"
    expected = right(student, teacher, x, 3, lambda net, x: captured(net, layer, x))
    assert term(student, teacher, layer, x) == pytest.approx(expected, rel=1e-4)


def test_informer() -> None:
    config = InformerConfig(
        prediction_length=6,
        context_length=32,
        lags_sequence=[1, 2],
        num_time_features=1,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
    )
    student, teacher = (seeded(seed, InformerModel, config).eval() for seed in (1, 2))
    batch = {
        "past_values": seeded(3, torch.randn, 8, 34),
        "past_time_features": torch.zeros(8, 34, 1),
        "past_observed_mask": torch.ones(8, 34),
        "future_values": seeded(4, torch.randn, 8, 6),
        "future_time_features": torch.zeros(8, 6, 1),
    }
    layer = "encoder.conv_layers.0"
    torch.manual_seed(0)  # its attention samples keys
    states = [captured(net, layer, **batch) for net in (student, teacher)]
    assert states[0].shape == (8, 16, 16)
    for net in (student, teacher):
        assert trace(net, (), batch).layer(layer).neuron_axis == 2


class Tagger(nn.Module):
    """Classes of each token, on the second axis as the loss of torch takes them, or on the last one."""

    def __init__(self, *, transposes: bool) -> None:
        super().__init__()
        self.rnn, self.head, self.transposes = nn.GRU(6, 10, batch_first=True), nn.Linear(10, 5), transposes

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.rnn(x)[0])
        return logits.mT if self.transposes else logits


@pytest.mark.parametrize("sides", [(True, True), (False, True), (True, False), (False, False)])
def test_as_many_tokens_as_classes(sides: tuple[bool, bool]) -> None:
    student, teacher = (seeded(seed, Tagger, transposes=side) for seed, side in enumerate(sides))
    x = seeded(3, torch.randn, 8, 5, 6)
    option = LogitDistillation(1.0, temperature=2.0)
    transfer = RepresentationTransfer(teacher, "rnn", weight=0.0, distillation=option)
    if any(sides):
        with transfer.attached(student), pytest.raises(ValueError, match="class_axis=1"):
            student(x)
        return
    with transfer.attached(student):
        student(x)
        loss = transfer.loss()
    logits = [(net(x).mT if side else net(x)).double() for net, side in zip((student, teacher), sides, strict=True)]
    mine, other = (functional.log_softmax(each / 2, -1) for each in logits)
    expected = 4 * functional.kl_div(mine, other, reduction="none", log_target=True).sum(-1).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padding", ["none", "right", "left", "one token"])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma", "OPT", "Bert"])
def test_decoders_of_texts_as_long_as_they_are_wide(name, padding):
    """Each block adds to the cache of keys that it gets, so that it cannot run again on what it has got by then."""
    sizes = {
        "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
        "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16},
        "Gemma": {"num_key_value_heads": 2, "head_dim": 8},
    }.get(name, {})
    shared = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**({"intermediate_size": 32} | shared | sizes))
    net = seeded(0, getattr(transformers, f"{name}Model"), config).eval()
    chosen = {}
    for length in (16, 17):
        mask = torch.ones(4, length, dtype=torch.long)
        if padding != "none":
            places = {"right": slice(9, None), "left": slice(None, 5), "one token": slice(-1, None)}
            mask[1, places[padding]] = 0
        ids = torch.randint(5, 50, (4, length), generator=torch.Generator().manual_seed(0)) * mask
        found = trace(net, (), {"input_ids": ids, "attention_mask": mask})
        chosen[length] = [(layer.name, layer.output.neuron_axis) for layer in block_candidates(found)]
    assert chosen[16] == chosen[17]
    assert len(chosen[16]) > 2
