"""Blocks whose output no module of known type has made: their axis is found, or it is said that they are left out."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer

SERIES = seeded(0, torch.randn, 6, 24, 3)


class PatchBlock(nn.Module):
    """As in PatchTST of Hugging Face: channels are joined to the samples inside, and a tuple is returned."""

    def __init__(self, width: int, swaps: bool) -> None:
        super().__init__()
        self.layer, self.swaps = nn.TransformerEncoderLayer(width, 2, 8, 0.0, batch_first=True), swaps

    def forward(self, x: Tensor) -> tuple[Tensor]:
        made = self.layer(x.flatten(0, 1)) + 0.1
        made = made.unflatten(0, x.shape[:2])
        return (made.mT if self.swaps else made,)


class PatchNet(nn.Module):
    def __init__(self, width: int, patches: int = 6, swaps: bool = False) -> None:
        super().__init__()
        self.patches, self.swaps = patches, swaps
        self.embed = nn.Linear(24 // patches, width)
        self.blocks = nn.ModuleList(PatchBlock(width, swaps) for _ in "ab")
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.mT.unflatten(2, (self.patches, -1)))
        for block in self.blocks:
            x = block(x)[0]
            x = x.mT if self.swaps else x
        return self.head(x.mean((1, 2)))


def _run(student: nn.Module, teacher: nn.Module, *inputs: Tensor, layers: object = "auto") -> RepresentationTransfer:
    transfer = RepresentationTransfer(teacher, layers, plan="uniform")
    with transfer.attached(student):
        student(*inputs)
        transfer.loss().backward()
    return transfer


@pytest.mark.parametrize(("patches", "swaps"), [(6, False), (8, False), (6, True), (8, True)])
def test_a_block_that_joins_axes_inside(patches: int, swaps: bool) -> None:
    """Eight patches of width 8: a probe tells which axis is which."""
    student = PatchNet(8, patches, swaps)
    pair = _run(student, PatchNet(12, patches, swaps), SERIES).pairs[-1]
    assert (pair.student, pair.teacher) == ("blocks.1", "blocks.1")
    assert pair.axes == ((2, 2) if swaps else (3, 3))
    assert [name for name, each in student.named_parameters() if each.grad is None] == ["head.weight", "head.bias"]


def test_patchtst() -> None:
    transformers = pytest.importorskip("transformers")

    def build(width: int, depth: int) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"d_model": width, "num_hidden_layers": depth, "num_attention_heads": 2, "ffn_dim": 2 * width}
        lengths = {"context_length": 24, "patch_length": 4, "patch_stride": 4, "prediction_length": 8}
        return transformers.PatchTSTForPrediction(
            transformers.PatchTSTConfig(num_input_channels=3, **lengths, **sizes)
        ).eval()

    pairs = _run(build(16, 4), build(32, 8), SERIES).pairs
    assert [pair.student for pair in pairs] == [f"model.encoder.layers.{number}" for number in range(4)]
    assert {pair.axes for pair in pairs} == {(3, 3)}


class Merged(nn.Module):
    """Pictures, and a language model on tokens of both: code makes its input, so a square shape tells nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vision = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, 5), (5, width)))
        self.words = nn.Embedding(20, width)
        self.layers = nn.ModuleList(PreNorm(width) for _ in "ab")
        self.head = nn.Linear(width, 20)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        for layer in self.vision:
            image = layer(image).relu()
        x = torch.cat([image.flatten(2).mT, self.words(ids)], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class RMS(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt()


class PreNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = RMS(), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + x.cumsum(1)
        return x + self.outer(self.inner(self.norm(x)).relu())


@pytest.mark.filterwarnings("ignore:.* more than the grid of 2 x 2 patches")
@pytest.mark.parametrize(("words", "is_square"), [(11, False), (14, True)])
def test_blocks_that_are_left_out_are_told(words: int, is_square: bool) -> None:
    inputs = seeded(0, torch.randn, 6, 3, 8, 8), seeded(1, torch.randint, 20, (6, words))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        transfer = _run(Merged(18), Merged(24), *inputs)
    told = [str(each.message) for each in found if "it is not known which axis" in str(each.message)]
    names = {pair.student for pair in transfer.pairs}
    if is_square:
        assert len(told) == 1
        assert "2 blocks of the student, from 'layers.0' to 'layers.1' (PreNorm), are left out" in told[0]
        assert "LayerPair('layers.1', 'layers.1', neuron_axis=-1)" in told[0]
        assert "layers.1" not in names
        named = _run(Merged(18), Merged(24), *inputs, layers=LayerPair("layers.1", "layers.1", neuron_axis=-1))
        assert named.pairs[0].axes == (2, 2)
    else:
        assert not told
        assert "layers.1" in names
