"""Tokens of images of other sizes than those of the first batch: their grid is that of their own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt import RepresentationTransfer


class Patches(nn.Module):
    """Patches of images of any size."""

    def __init__(self, width: int, prefix: int = 0) -> None:
        super().__init__()
        self.embed, self.mix = nn.Conv2d(3, width, 8, 8), nn.Linear(width, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if prefix else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
        return self.mix(torch.tanh(tokens))


def timm_vit(width: int) -> nn.Module:
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": width, "depth": 2, "num_heads": 2, "num_classes": 5}
    return pytest.importorskip("timm").create_model("vit_tiny_patch16_224", dynamic_img_size=True, **sizes)


def dinov2(width: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 64, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=width, **sizes))


def swin(width: int) -> nn.Module:
    """Its tokens are merged by four between its stages."""
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 64, "patch_size": 4, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    return transformers.SwinModel(transformers.SwinConfig(embed_dim=width, **sizes))


#: A network, its layer, the size of a token in pixels, and how many tokens stand in front.
NETWORKS: dict[str, tuple[Callable[[int], nn.Module], str, int, int]] = {
    "patches": (Patches, "mix", 8, 0),
    "patches and a class token": (lambda width: Patches(width, 1), "mix", 8, 1),
    "ViT of timm": (timm_vit, "blocks.1", 8, 1),
    "DINOv2": (dinov2, "encoder.layer.1", 8, 1),
    "Swin, merged tokens": (swin, "encoder.layers.1.blocks.0", 8, 0),
}

#: As many tokens as in the first batch, fewer and more of them.
SIZES = [(64, 64), (32, 128), (128, 32), (64, 32), (64, 64)]


def images(size: tuple[int, int]) -> Tensor:
    return F.interpolate(torch.randn(6, 3, size[0] // 8, size[1] // 8), size)


def output(net: nn.Module, layer: str, x: Tensor) -> Tensor:
    kept: list[Any] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        net(x)
    handle.remove()
    found = kept[-1]
    return (found if isinstance(found, Tensor) else found[0]).double()


def rows(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 4).movedim(1, 0).flatten(1)


def by_hand(student: Tensor, teacher: Tensor) -> float:
    """A uniform plan: the mean of 1 - r over all pairs of neurons."""
    return float(1 - torch.corrcoef(torch.cat([student, teacher]))[: len(student), len(student) :].mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_tokens_beside_one_of_maps(name: str) -> None:
    build, layer, pixels, prefix = NETWORKS[name]
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Tanh(), nn.Conv2d(8, 12, 1), nn.Tanh()).eval()
    student = build(8).eval()
    transfer = RepresentationTransfer(teacher, [(layer, "3")], weight=1.0, plan="uniform")
    with transfer.attached(student):
        for size in SIZES:
            x = images(size)
            student(x)
            found = float(transfer.loss().detach())
            tokens = output(student, layer, x)[:, prefix:].mT
            y = rows(tokens.unflatten(2, (size[0] // pixels, size[1] // pixels)))
            assert found == pytest.approx(by_hand(y, rows(output(teacher, "3", x))), rel=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_large_and_small_crops_in_one_step(name: str) -> None:
    """The term is the mean over the two forwards, each on its own grid."""
    build, layer, pixels, prefix = NETWORKS[name]
    torch.manual_seed(0)
    student, teacher = build(8).eval(), build(12).eval()
    transfer = RepresentationTransfer(teacher, [(layer, layer)], weight=1.0, plan="uniform")
    crops = {(64, 64): images((64, 64)), (32, 64): images((32, 64))}
    with transfer.attached(student):
        for x in crops.values():
            student(x)
        found = float(transfer.loss().detach())
    expected = []
    for size, x in crops.items():
        grid = size[0] // pixels, size[1] // pixels
        expected.append(
            by_hand(*(rows(output(net, layer, x)[:, prefix:].mT.unflatten(2, grid)) for net in (student, teacher)))
        )
    assert found == pytest.approx(sum(expected) / 2, rel=1e-4)


class Dropping(Patches):
    """Training drops tokens that evaluation keeps."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT
        return self.mix(tokens[:, ::2] if self.training else tokens)


def test_tokens_that_are_dropped_in_training_are_an_error() -> None:
    student, transfer = Dropping(8), RepresentationTransfer(Patches(12), [("mix", "mix")])
    why = "32 tokens after 0 prefix tokens, which do not fill"
    with transfer.attached(student), pytest.raises(ValueError, match=why):
        student(images((64, 64)))
