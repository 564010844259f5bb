"""``"auto"`` where a network sees and reads, mixes positions, or has no head; and what the term trains of it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt import RepresentationTransfer
from lightning_otrt.layers.automatic import block_groups
from lightning_otrt.reading.tracer import trace

IMAGES, WORDS = seeded(0, torch.randn, 6, 3, 32, 32), seeded(1, torch.randint, 3, 50, (6, 12))
VALID = (torch.arange(12) < torch.tensor([[3], [12], [5], [4], [7], [9]])).float()


def _pairs(student: nn.Module, teacher: nn.Module, *args: Tensor, layers: object = "auto") -> tuple[list, list[str]]:
    transfer = RepresentationTransfer(teacher, layers, weight=1.0, plan="uniform")
    reports: list[str] = []
    transfer.report = reports.append
    with transfer.attached(student):
        student(*args)
        transfer.loss().backward()
    return [(pair.student, pair.teacher) for pair in transfer.pairs], reports


def _without_gradient(student: nn.Module) -> list[str]:
    return [name for name, parameter in student.named_parameters() if parameter.grad is None]


class SeesAndReads(nn.Module):
    """Convolutions for an image and a transformer for a question, in either order."""

    def __init__(self, width: int, first: str) -> None:
        super().__init__()
        self.first = first
        self.conv = nn.ModuleList(nn.Conv2d(channels, width, 3, 2, 1) for channels in (3, width))
        self.embed = nn.Embedding(50, width)
        self.text = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 16, 0.0, batch_first=True) for _ in "ab")
        self.head = nn.Linear(2 * width, 4)

    def see(self, x: Tensor) -> Tensor:
        for layer in self.conv:
            x = layer(x).relu()
        return x.mean((2, 3))

    def read(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.text:
            x = layer(x)
        return x.mean(1)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.first == "image":
            seen, read = self.see(x), self.read(ids)
        else:
            read, seen = self.read(ids), self.see(x)
        return self.head(torch.cat([seen, read], 1))


@pytest.mark.parametrize("first", ["image", "text"])
@pytest.mark.parametrize("teachers_first", ["image", "text"])
def test_both_towers_in_whatever_order_they_run(first: str, teachers_first: str) -> None:
    student = SeesAndReads(8, first)
    found, _ = _pairs(student, SeesAndReads(12, teachers_first), IMAGES, WORDS)
    names = ["conv.0", "conv.1", "text.0", "text.1"]
    assert found == [(name, name) for name in names]
    assert _without_gradient(student) == ["head.weight", "head.bias"]


class Permutator(nn.Module):
    """Mixes rows, columns and channels of maps (B, H, W, C)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.rows, self.columns, self.channels = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        columns = self.columns(x.permute(0, 1, 3, 2)).permute(0, 1, 3, 2)
        return x + rows + columns + self.channels(x)


class SparseMixer(nn.Module):
    """The same of maps (B, C, H, W)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.rows, self.columns = nn.Linear(size, size), nn.Linear(size, size)
        self.fuse = nn.Conv2d(3 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows(x.transpose(2, 3)).transpose(2, 3)
        return x + self.fuse(torch.cat([x, rows, self.columns(x)], 1))


class Mixing(nn.Module):
    def __init__(self, width: int, block: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.is_last = nn.Conv2d(3, width, 4, 4), block is Permutator
        self.blocks = nn.ModuleList(block(width, 8) for _ in "abc")
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x.permute(0, 2, 3, 1) if self.is_last else x
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2) if self.is_last else (2, 3)))


@pytest.mark.parametrize("block", [Permutator, SparseMixer])
@pytest.mark.parametrize("width", [8, 16])
def test_no_layer_with_rows_as_neurons_is_a_block(block: type[nn.Module], width: int) -> None:
    found, _ = _pairs(Mixing(width, block), Mixing(2 * width, block), IMAGES)
    assert found[-1] == ("blocks.2", "blocks.2")
    assert all(name.count(".") == 1 for pair in found for name in pair)


class Turning(nn.Module):
    """A stage that moves the channels of what its blocks give, so that nothing tells its own axis."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.merge = nn.Linear(4 * inputs, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pixel_unshuffle(x, 2).permute(0, 2, 3, 1)
        x = self.merge(x)
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)


def test_blocks_of_a_stage_that_moves_the_channels() -> None:
    def build(width: int) -> nn.Module:
        stages = Turning(3, width), Turning(width, width)
        return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))

    found, _ = _pairs(build(6), build(12), IMAGES)
    assert found == [("0.blocks.1", "0.blocks.1"), ("1.blocks.1", "1.blocks.1")]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Sentence(nn.Module):
    """Returns the mean over its tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(50, width), nn.ModuleList(Block(width) for _ in "ab")

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)


def test_the_last_layer_of_a_block_is_no_head() -> None:
    found, _ = _pairs(Sentence(8), Sentence(12), WORDS, VALID)
    assert found == [("blocks.0", "blocks.0"), ("blocks.1", "blocks.1")]


class Ensemble(nn.Module):
    """The mean of several heads on the same features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, width), nn.ReLU())
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Linear(width, 3)) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return torch.stack([head(x) for head in self.heads]).mean(0)


def test_heads_in_a_list_are_heads() -> None:
    found, _ = _pairs(Ensemble(8), Ensemble(12), seeded(2, torch.randn, 6, 5))
    assert found == [("heads.1.1:input", "heads.1.1:input")]


class ByChannel(nn.Module):
    """Each channel of a series is a row of its own, as in PatchTST."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(4, width), nn.Linear(5 * 3 * width, 2)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 16, 0.0, batch_first=True) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        rows = self.enter(x.mT.unflatten(2, (3, 4)).flatten(0, 1))
        for block in self.blocks:
            rows = block(rows)
        return self.head(rows.reshape(len(x), -1))


def test_blocks_of_rows_where_there_are_no_others() -> None:
    series = seeded(2, torch.randn, 6, 12, 5)
    found, _ = _pairs(ByChannel(8), ByChannel(12), series)
    assert found == [("blocks.0", "blocks.0"), ("blocks.1", "blocks.1")]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3)])
def test_a_norm_of_the_inputs_is_no_block(norm: nn.Module) -> None:
    def build(width: int) -> nn.Module:
        blocks = [nn.Sequential(nn.Conv2d(inputs, width, 3, 2, 1), nn.ReLU()) for inputs in (3, width)]
        return nn.Sequential(norm, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))

    found, _ = _pairs(build(8), copy.deepcopy(build(12)), IMAGES)
    assert found == [("1", "1"), ("2", "2")]


class Recommender(nn.Module):
    """Users and items: one tower for each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.users, self.items = (
            nn.Sequential(nn.Embedding(50, width), nn.Linear(width, width), nn.ReLU()) for _ in "ab"
        )
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return self.scale * (self.users(users) * self.items(items)).sum(1)


def test_what_the_term_does_not_train_is_told() -> None:
    student, ids = Recommender(8), WORDS[:, 0]
    _, reports = _pairs(student, Recommender(12), ids, ids, layers=["items"])
    [told] = [text for text in reports if text.startswith("The transfer term trains")]
    assert told.startswith("The transfer term trains 3 of the 7 tensors before the recorded layers")
    unreached = ["scale", "users.0.weight", "users.1.weight", "users.1.bias"]
    assert _without_gradient(student) == unreached
    assert f"no gradient reaches {', '.join(map(repr, unreached))}." in told
    _, reports = _pairs(Recommender(8), Recommender(12), ids, ids, layers=["items", "users"])
    assert "no gradient reaches 'scale'." in reports[-1]


class Detached(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.top, self.head = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.top(self.body(x).relu().detach()))


def test_a_detached_body_is_told() -> None:
    _, reports = _pairs(Detached(8), Detached(12), torch.randn(6, 5), layers=["top"])
    assert reports[-1].startswith("The transfer term trains 2 of the 4 tensors before the recorded layers")
    assert "'body.weight', 'body.bias'" in reports[-1]


def test_a_checkpoint_that_hides_its_weights_is_not() -> None:
    class Checkpointed(Detached):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                x = torch.utils.checkpoint.checkpoint(self.body, x.requires_grad_(), use_reentrant=True)
            else:
                x = self.body(x)
            return self.head(self.top(x))

    _, reports = _pairs(Checkpointed(8), Checkpointed(12), torch.randn(6, 5), layers=["top"])
    assert len(reports) == 1


class Seasonal(nn.Module):
    """A moving average of the series, without weights, then layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.average = nn.AvgPool1d(5, 1, 2)
        self.conv = nn.Sequential(nn.Conv1d(3, width, 3, 2), nn.ReLU())
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x - self.average(2 * x)).mean(2))


def test_what_has_no_weights_before_it_is_no_block() -> None:
    pairs, _ = _pairs(Seasonal(4), Seasonal(6), torch.randn(5, 3, 20))
    assert pairs == [("conv", "conv")]


class Pyramid(nn.Module):
    """Three levels that are added up from the coarsest on, each with its own head."""

    def __init__(self, width: int, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.form = form
        self.down = nn.ModuleList(nn.Conv2d(i, width, 3, 2, 1) for i in (3, width, width))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.lateral = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(3))
        self.heads = nn.ModuleList(nn.Conv2d(width, 18, 1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Any]:
        maps = []
        for down, norm in zip(self.down, self.norms, strict=True):
            x = F.relu(norm(down(x)))
            maps.append(x)
        levels = [self.lateral[2](maps[2])]
        for number in (1, 0):
            levels.append(self.lateral[number](maps[number]) + F.interpolate(levels[-1], scale_factor=2))
        return [self.form(head(level)) for head, level in zip(self.heads, levels, strict=True)]


@pytest.mark.parametrize(
    "form",
    [
        lambda made: made,
        lambda made: made.view(len(made), 2, 9, *made.shape[2:]).permute(0, 1, 3, 4, 2).contiguous(),
        lambda made: made.view(len(made), 2, 9, -1),
        lambda made: made.split([8, 10], 1),
        lambda made: torch.cat([made[:, :8].exp(), made[:, 8:].sigmoid()], 1).flatten(2),
        lambda made: {"boxes": made[:, :8], "scores": made[:, 8:].sigmoid()},
    ],
)
def test_heads_of_several_levels_are_no_blocks(form: Callable[[Tensor], Any]) -> None:
    pairs, _ = _pairs(Pyramid(4, form), Pyramid(6, form), torch.randn(2, 3, 32, 32))
    assert pairs == [("lateral.2", "lateral.2"), ("lateral.1", "lateral.1"), ("lateral.0", "lateral.0")]


class Branches(nn.Module):
    """Four dilated blocks, then branches of a spatial pyramid that get the same map, as in DeepLab."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [3, *[width] * 4]
        self.blocks = nn.ModuleList(_branch(i, o, 2 if i == 3 else 1) for i, o in itertools.pairwise(sizes))
        self.branches = nn.ModuleList(_branch(width, width, 1) for _ in range(4))
        self.project, self.head = nn.Conv2d(4 * width, width, 1), nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x) if x.shape[1] != 3 else block(x)
        return self.head(self.project(torch.cat([branch(x) for branch in self.branches], 1)))


def _branch(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


def test_branches_that_get_the_same_map_are_no_stack() -> None:
    pairs, _ = _pairs(Branches(4), Branches(6), torch.randn(4, 3, 16, 16))
    assert pairs == [(f"blocks.{number}", f"blocks.{number}") for number in range(4)]


class Sentences(nn.Module):
    """Convolutions of several widths over the same words, and the largest value of each neuron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, size, padding=size // 2) for size in (3, 5, 7))
        self.head = nn.Linear(3 * width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).mT
        return self.head(torch.cat([conv(x).relu().amax(2) for conv in self.convs], 1))


def test_one_of_several_convolutions_of_the_same_words_is_no_block() -> None:
    pairs, _ = _pairs(Sentences(6), Sentences(8), WORDS)
    assert pairs == [("head:input", "head:input")]


def test_the_pyramid_of_deeplab_is_no_stack() -> None:
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=5)
    names = [name for group in block_groups(trace(net, (torch.randn(2, 3, 64, 64),))) for name in group]
    assert names == ["backbone.relu", "backbone.layer1", "backbone.layer2", "backbone.layer4"]
