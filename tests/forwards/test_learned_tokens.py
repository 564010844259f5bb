"""Learned queries, latent vectors and class tokens of attention are no patches: no warning of random ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import with_slow
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer

SIZES = {"DetrModel": 96, "Mask2FormerForUniversalSegmentation": 64}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Detector(nn.Module):
    """The decoder of torch with learned queries, as in DETR."""

    def __init__(self, width: int, kind: str, count: int = 7) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.queries = nn.Parameter(torch.randn(count, width)) if kind == "parameter" else nn.Embedding(count, width)
        layer = nn.TransformerDecoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).mT
        queries = self.queries if isinstance(self.queries, nn.Parameter) else self.queries.weight
        return self.decoder(queries.expand(len(images), -1, -1), patches)


class Latents(nn.Module):
    """Latent vectors that get the patches by a name of its own."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.mix, self.attention = nn.Linear(width, width), nn.MultiheadAttention(width, 2, batch_first=True)

        def forward(self, latents: Tensor, image: Tensor) -> Tensor:
            return self.mix(self.attention(latents, image, image)[0])

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.latents = nn.Conv2d(3, width, 8, 8), nn.Parameter(torch.randn(1, 5, width))
        self.block = self.Block(width)

    def forward(self, images: Tensor) -> Tensor:
        return self.block(self.latents.expand(len(images), -1, -1), self.embed(images).flatten(2).mT)


class Levels(nn.Module):
    """Queries that look at maps of several sizes, which come as a list."""

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.mix, self.attention = nn.Linear(width, width), nn.MultiheadAttention(width, 2, batch_first=True)

        def forward(self, hidden_states: Tensor, encoder_hidden_states: list[Tensor]) -> Tensor:
            for level in encoder_hidden_states:
                hidden_states = hidden_states + self.attention(hidden_states, level, level)[0]
            return self.mix(hidden_states)

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.embed, self.queries = nn.Conv2d(3, width, 8, 8), nn.Embedding(count, width)
        self.coarse, self.layer = nn.Conv2d(width, width, 2, 2), self.Layer(width)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.embed(images)
        levels = [level.flatten(2).mT for level in (fine, self.coarse(fine))]
        return self.layer(self.queries.weight.expand(len(images), -1, -1), encoder_hidden_states=levels)


class ClassAttention(nn.Module):
    """One token that looks at all patches, as in CaiT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.token = nn.Conv2d(3, width, 8, 8), nn.Parameter(torch.randn(1, 1, width))
        self.attention, self.mix = nn.MultiheadAttention(width, 2, batch_first=True), nn.Linear(width, width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).mT
        return self.mix(self.attention(self.token.expand(len(images), -1, -1), patches, patches)[0])


class Masked(nn.Module):
    """A random part of the patches, as a masked autoencoder takes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Conv2d(3, width, 8, 8), nn.Linear(width, width)

    def forward(self, images: Tensor) -> Tensor:
        return self.mix(self.embed(images).flatten(2).mT[:, :6])


def detr(width: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=width,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=3,
        **sizes,
    )
    return transformers.DetrModel(config)


def mask2former(width: int, queries: int) -> nn.Module:
    """Its coarsest map has 2 x 2 positions."""
    transformers = pytest.importorskip("transformers")
    swin = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2}
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(image_size=64, patch_size=4, out_features=stages, **swin),
        **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 2 * width),
        **dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 16),
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=2,
        num_queries=queries,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def cait(width: int) -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
    return timm.models.Cait(embed_dim=width, **sizes)


CASES: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "queries, parameter": (lambda width: Detector(width, "parameter"), "decoder.layers.0"),
    "queries, embedding": (lambda width: Detector(width, "embedding"), "decoder.layers.0.linear2"),
    "as many queries as patches": (lambda width: Detector(width, "embedding", 16), "decoder.layers.0.linear2"),
    "one more query than patches": (lambda width: Detector(width, "embedding", 17), "decoder.layers.0.linear2"),
    "queries of several maps": (lambda width: Levels(width, 5), "layer.mix"),
    "as many queries as the coarse map has positions": (lambda width: Levels(width, 4), "layer.mix"),
    "latent vectors": (Latents, "block.mix"),
    "class attention": (ClassAttention, "mix"),
    "DETR": (detr, "decoder.layers.1"),
    "Mask2Former": (lambda width: mask2former(width, 5), "model.transformer_module.decoder.layers.0"),
    "Mask2Former, 4 queries": (lambda width: mask2former(width, 4), "model.transformer_module.decoder.layers.0.fc2"),
    "CaiT": (cait, "blocks_token_only.0"),
}


def run(build: Callable[[int], nn.Module], layer: str) -> float:
    torch.manual_seed(0)
    student, teacher = build(16), build(32)
    transfer = RepresentationTransfer(teacher, [LayerPair(layer, layer)], weight=1.0, plan="uniform")
    with transfer.attached(student):
        student(torch.nn.functional.interpolate(IMAGES, SIZES.get(type(student).__name__, 32)))
        return float(transfer.loss().detach())


@pytest.mark.parametrize("name", with_slow(CASES, "Mask2Former"))
def test_no_warning(name: str) -> None:
    build, layer = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(build, layer) > 0


def test_a_part_of_the_patches() -> None:
    with pytest.warns(UserWarning, match="masked autoencoders"):
        run(Masked, "mix")
