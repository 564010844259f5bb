"""Numbers and words in the names of modules, gates, projections: what looks like a block or a head and is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_otrt import compare_representations
from lightning_otrt.layers.automatic import block_groups, block_names
from lightning_otrt.layers.comparable import comparable_layers
from lightning_otrt.layers.head import penultimate_names
from lightning_otrt.layers.no_blocks import why_no_blocks
from lightning_otrt.layers.pairs import LayerPair, pair_labels
from lightning_otrt.layers.resolve import resolve_layers
from lightning_otrt.reading.tracer import trace

IDS, IMAGES = torch.randint(0, 20, (3, 7)), torch.randn(2, 3, 32, 32)


class Translator(nn.Module):
    """An encoder and a decoder in a module of any name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.embed, self.head = name, nn.Embedding(20, 16), nn.Linear(16, 20)
        self.add_module(name, nn.Transformer(16, 2, 4, 4, 32, dropout=0.0, batch_first=True))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.get_submodule(self.name)(x, x))


@pytest.mark.parametrize("name", ["transformer", "t5", "seq2seq", "model_1"])
def test_encoder_and_decoder_in_a_module_with_a_number(name: str) -> None:
    expected = [[f"{name}.{part}.layers.{index}" for index in (1, 3)] for part in ("encoder", "decoder")]
    assert block_groups(trace(Translator(name), (IDS,))) == expected
    behind = nn.Sequential(nn.Identity(), Translator(name))
    assert block_groups(trace(behind, (IDS,))) == [[f"1.{each}" for each in part] for part in expected]


class TwoStreams(nn.Module):
    """Two networks that get the same tensor."""

    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        self.names, self.stem, self.fc = names, nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()), nn.Linear(32, 5)
        for name in names:
            stages = [
                nn.Sequential(nn.Conv2d(before, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()) for before in (8, 16, 16)
            ]
            self.add_module(name, nn.Sequential(*stages))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(torch.cat([self.get_submodule(name)(x) for name in self.names], 1).mean((2, 3)))


@pytest.mark.parametrize("names", [("left", "right"), ("branch1", "branch2")])
def test_deep_networks_on_one_tensor_are_no_branches(names: tuple[str, str]) -> None:
    found = block_names(trace(TwoStreams(names), (IMAGES,)))
    assert found == ["stem", f"{names[1]}.0", f"{names[1]}.1", names[1]]


class Gate(nn.Module):
    """Squeeze and excitation with linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class Gated(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(before, width, 3, stride, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.se, self.relu = Gate(width), nn.ReLU()
        self.down = nn.Conv2d(before, width, 1, stride) if before != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.se(self.conv2(self.relu(self.conv1(x)))) + self.down(x))


@pytest.mark.parametrize("has_head", [False, True])
def test_a_gate_is_no_head(has_head: bool) -> None:
    stages = [nn.Sequential(Gated(3, 8, 2), Gated(8, 8, 1)), nn.Sequential(Gated(8, 16, 2), Gated(16, 16, 1))]
    rest = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *([nn.Linear(16, 5)] if has_head else [])]
    seen = trace(nn.Sequential(*stages, *rest), (IMAGES,))
    assert block_names(seen) == ["0", "1"]
    assert penultimate_names(seen) == (["4:input"] if has_head else [])


class Averaged(nn.Module):
    """Logits of frames, which a layer averages behind the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.fc, self.pool = nn.Linear(8, 5), nn.AdaptiveAvgPool1d(1)

    def forward(self, frames: Tensor) -> Tensor:
        scores = self.fc(self.body(frames.flatten(0, 1))).view(*frames.shape[:2], -1)
        return self.pool(scores.transpose(1, 2)).squeeze(-1)


def test_a_head_before_an_average_is_one() -> None:
    assert penultimate_names(trace(Averaged(), (torch.randn(3, 4, 6),))) == ["fc:input"]


def conv(before: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU())


@pytest.mark.parametrize("joined", [False, True])
def test_branches_of_a_few_convolutions_are_no_networks(joined: bool) -> None:
    """Heads of a detector, and branches as of an Inception block."""

    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(conv(3, 8, 2), conv(8, 16, 2), conv(16, 16, 2))
            self.branches = nn.ModuleList(nn.Sequential(conv(16, 16), conv(16, 16)) for _ in range(3))
            self.fc = nn.Linear(48, 5)

        def forward(self, x: Tensor) -> Any:
            x = self.body(x)
            found = [branch(x) for branch in self.branches]
            return self.fc(torch.cat(found, 1).mean((2, 3))) if joined else found

    assert block_names(trace(Branched(), (IMAGES,))) == ["body.0", "body.1", "body"]


def test_coarse_logits_are_no_block() -> None:
    """They are resized and refined by a later layer, which gets the image, too."""

    class CoarseToFine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(3, 8, 2), conv(8, 16, 2)
            self.coarse, self.refine = nn.Conv2d(16, 21, 1), nn.Sequential(conv(24, 16), nn.Conv2d(16, 21, 1))

        def forward(self, x: Tensor) -> Tensor:
            coarse = functional.interpolate(self.coarse(self.second(self.first(x))), x.shape[2:]).softmax(1)
            return self.refine(torch.cat([x, coarse], 1))

    assert "coarse" not in block_names(trace(CoarseToFine(), (IMAGES,)))


class Chain(nn.Module):
    """Convolutions with activations in code."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(before, width, 3, 2, 1) for before, width in zip((3, *widths), widths, strict=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = functional.relu(conv(x))
        return x


@pytest.mark.parametrize("widths", [(32, 64, 64, 64), (64, 64, 64, 64), (32, 48, 56, 64)])
def test_layers_with_as_many_channels_as_the_output(widths: tuple[int, ...]) -> None:
    assert block_names(trace(Chain(widths), (IMAGES,))) == ["convs.0", "convs.1", "convs.2"]


def test_pictures_in_the_middle_are_outputs() -> None:
    """Three channels are no representation, whatever comes after them."""

    class Refined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.picture = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 3, 3, 1, 1)
            self.second, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 3, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = functional.relu(self.picture(functional.relu(self.first(x))))
            return self.last(functional.relu(self.second(x)))

    assert block_names(trace(Refined(), (IMAGES,))) == ["first", "second"]


def test_several_recurrent_modules_are_compared() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Embedding(20, 16), nn.Linear(16, 4)
            self.lstm1, self.lstm2 = (nn.LSTM(16, 16, batch_first=True) for _ in range(2))

        def forward(self, ids: Tensor) -> Tensor:
            return self.fc(self.lstm2(self.lstm1(self.embed(ids))[0])[0][:, -1])

    assert comparable_layers(trace(Tagger(), (IDS,))) == ("embed", "lstm1", "lstm2")


@pytest.mark.parametrize("named", [True, False])
def test_what_enters_the_head_and_not_a_projection(named: bool) -> None:
    class Contrastive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.fc, self.project = nn.Linear(8, 10), nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.body(x)
            return {"logits" if named else "scores": self.fc(x), "embedding": self.project(x)}

    # Without the name nothing tells which of the two is the head: it is the last one.
    assert penultimate_names(trace(Contrastive(), (IMAGES,))) == ["fc:input" if named else "project.2:input"]


class Blocks(nn.Module):
    """Its layers are in a module that is called like a word."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.blocks(x))


@pytest.mark.parametrize("layers", ["auto", "all"])
def test_a_module_that_is_called_blocks(layers: str) -> None:
    data = DataLoader(TensorDataset(torch.randn(24, 8), torch.zeros(24)), 12)
    student, teacher = Blocks(16), Blocks(24)
    found = compare_representations(student, teacher, data, layers=layers, teacher_layers=layers, progress=False)
    assert "blocks" in found.student_layers
    traces = [trace(net, (torch.randn(4, 8),)) for net in (student, teacher)]
    pairs = resolve_layers(found.as_layers(), *traces)
    assert [(pair.student, pair.teacher) for pair in pairs] == list(found.pairing)


def test_names_in_advice_are_those_of_both_networks() -> None:
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Blocks(16)

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

    x = torch.randn(4, 8)
    student, teacher = trace(Task(), (x,), root="net"), trace(Blocks(24), (x,))
    advice = why_no_blocks(student, "student")
    assert advice.endswith("layers=['re:blocks'].")
    assert [pair.student for pair in resolve_layers(["re:blocks"], student, teacher)] == ["net.blocks"]


def test_no_two_labels_are_alike() -> None:
    labels = pair_labels([LayerPair("a", "x"), LayerPair("a", "y"), LayerPair("a-x", "z")])
    assert len(set(labels)) == 3
