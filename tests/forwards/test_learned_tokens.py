"""Learned queries, latent vectors and class tokens of attention are no patches: no warning of random ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Detector(nn.Module):
    """The decoder of torch with learned queries, as in DETR."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.queries = nn.Parameter(torch.randn(7, width)) if kind == "parameter" else nn.Embedding(7, width)
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


def cait(width: int) -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
    return timm.models.Cait(embed_dim=width, **sizes)


CASES: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "queries, parameter": (lambda width: Detector(width, "parameter"), "decoder.layers.0"),
    "queries, embedding": (lambda width: Detector(width, "embedding"), "decoder.layers.0.linear2"),
    "latent vectors": (Latents, "block.mix"),
    "class attention": (ClassAttention, "mix"),
    "DETR": (detr, "decoder.layers.1"),
    "CaiT": (cait, "blocks_token_only.0"),
}


def run(build: Callable[[int], nn.Module], layer: str) -> float:
    torch.manual_seed(0)
    student, teacher = build(16), build(32)
    transfer = RepresentationTransfer(teacher, [LayerPair(layer, layer)], weight=1.0, plan="uniform")
    with transfer.attached(student):
        student(torch.nn.functional.interpolate(IMAGES, 96) if "DETR" in type(student).__name__.upper() else IMAGES)
        return float(transfer.loss().detach())


@pytest.mark.parametrize("name", CASES)
def test_no_warning(name: str) -> None:
    build, layer = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(build, layer) > 0


def test_a_part_of_the_patches() -> None:
    with pytest.warns(UserWarning, match="masked autoencoders"):
        run(Masked, "mix")
