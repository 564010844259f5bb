"""Tokens as the cells of a grid: patches, merged patches, and a part of them that is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt.reading.token_grid import TokenGrid, find_token_grid
from lightning_otrt.reading.tracer import trace


def grid_of(model: nn.Module, name: str, *args: Tensor) -> TokenGrid:
    found = trace(model, args)
    layer = found.layer(name)
    assert layer.output is not None
    return find_token_grid(found, layer, layer.output)


class Patches(nn.Module):
    """A patch embedding, ``forward`` of a subclass on the tokens, and two layers behind it."""

    def __init__(self, widths: tuple[int, int] = (6, 8)) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 2, stride=2)
        self.norm = nn.LayerNorm(widths[0])
        self.linear = nn.Linear(*widths)

    def select(self, tokens: Tensor) -> Tensor:
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.linear(self.norm(self.select(self.embed(images).flatten(2).mT)))
        return tokens.mean(1)


class Merged(Patches):
    """Squares of 2 x 2 patches, concatenated along the channels, on a grid of 4 x 6."""

    def select(self, tokens: Tensor) -> Tensor:
        batch, _, width = tokens.shape
        squares = tokens.view(batch, 2, 2, 3, 2, width).transpose(2, 3)
        return squares.reshape(batch, 6, 4 * width)


class Kept(Patches):
    """A quarter of the patches, in random order."""

    def select(self, tokens: Tensor) -> Tensor:
        return tokens[:, torch.randperm(tokens.shape[1])[: tokens.shape[1] // 4]]


IMAGES = torch.randn(2, 3, 8, 12)


@pytest.mark.parametrize("name", ["norm", "linear"])
def test_patches(name: str) -> None:
    assert grid_of(Patches(), name, IMAGES) == TokenGrid(0, (4, 6), "embed")


@pytest.mark.parametrize("name", ["norm", "linear"])
def test_merged_patches(name: str) -> None:
    assert grid_of(Merged((24, 12)), name, IMAGES) == TokenGrid(0, (2, 3), "embed", merged=2)


@pytest.mark.parametrize("name", ["norm", "linear"])
def test_a_part_of_the_patches_is_no_grid(name: str) -> None:
    """Also where a layer behind it has another width."""
    assert grid_of(Kept((6, 24)), name, IMAGES) == TokenGrid(0, part_of=(4, 6))


def test_swin() -> None:
    """Three stages, each with half of the rows and columns of the one before."""
    transformers = pytest.importorskip("transformers")
    model = transformers.SwinModel(
        transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 4], window_size=2
        )
    ).eval()
    found = trace(model, (torch.randn(2, 3, 32, 32),))
    layers = [found.layer(f"encoder.layers.{stage}.blocks.0") for stage in range(3)]
    sizes = [find_token_grid(found, layer, layer.output).size for layer in layers if layer.output is not None]
    assert sizes == [(16, 16), (8, 8), (4, 4)]
