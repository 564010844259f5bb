"""Well-known architectures, and the layers that have to be chosen in them. Weights are random and inputs small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.tracer import trace


@dataclass(frozen=True)
class Case:
    """A model, its input, and what has to be chosen in it."""

    build: Callable[[], nn.Module]
    blocks: list[str]
    penultimate: str
    size: int = 64
    inputs: dict[str, Any] = field(default_factory=dict)
    prefix_tokens: int = 0

    def trace(self) -> Trace:
        torch.manual_seed(0)
        args = () if self.inputs else (torch.randn(2, 3, self.size, self.size),)
        return trace(self.build(), args, self.inputs)


def _version(package: str) -> int:
    """The first number of a version; 0 for what is not installed."""
    try:
        return int(metadata.version(package).partition(".")[0])
    except metadata.PackageNotFoundError:
        return 0


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    return lambda: models.get_model(name, weights=None)


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, pretrained=False, **options)


def huggingface_model(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        return getattr(transformers, name)(getattr(transformers, config)(**options))

    return build


def small_vit() -> nn.Module:
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=6, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )


TINY = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}
#: What a ViT of Hugging Face calls its blocks since version 5.
HF_VIT = "layers" if _version("transformers") >= 5 else "encoder.layer"
RESNET = ["relu", "layer1", "layer2", "layer3", "layer4"]
TIMM_VIT = ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]
VIT = [f"encoder.layers.encoder_layer_{i}" for i in (0, 2, 3, 5)]
WORDS = {
    "input_ids": torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(2, 7, dtype=torch.long),
}

CASES = {
    "resnet18": Case(torchvision_model("resnet18"), RESNET, "fc:input"),
    "resnet50": Case(torchvision_model("resnet50"), RESNET, "fc:input"),
    "mobilenet_v3_small": Case(
        torchvision_model("mobilenet_v3_small"),
        ["features.0", "features.1", "features.3", "features.8", "features"],
        "classifier.2:input",
    ),
    "efficientnet_b0": Case(
        torchvision_model("efficientnet_b0"),
        ["features.1", "features.2", "features.3", "features.5", "features"],
        "classifier.0:input",
    ),
    "convnext_tiny": Case(
        torchvision_model("convnext_tiny"), ["features.1", "features.3", "features.5", "features"], "classifier.2:input"
    ),
    "swin_t": Case(torchvision_model("swin_t"), ["features.1", "features.3", "features.5", "norm"], "head:input"),
    "densenet121": Case(
        torchvision_model("densenet121"),
        ["features.relu0", *(f"features.denseblock{i}" for i in (1, 2, 3)), "features"],
        "classifier:input",
    ),
    "regnet_y_400mf": Case(
        torchvision_model("regnet_y_400mf"),
        ["stem", *(f"trunk_output.block{i}" for i in (1, 2, 3)), "trunk_output"],
        "fc:input",
    ),
    "vgg11": Case(
        torchvision_model("vgg11"),
        [*(f"features.{i}" for i in (1, 4, 9, 14, 19)), "features"],
        "classifier.5:input",
    ),
    "squeezenet1_1": Case(
        torchvision_model("squeezenet1_1"),
        ["features.1", "features.4", "features.7", "features"],
        "classifier.0:input",
    ),
    "vit_b_16": Case(
        torchvision_model("vit_b_16"),
        [f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8, 11)],
        "heads.head:input",
        size=224,
        prefix_tokens=1,
    ),
    "small vit": Case(small_vit, VIT, "heads.head:input", size=32, prefix_tokens=1),
    "timm resnet10t": Case(timm_model("resnet10t"), ["act1", "layer1", "layer2", "layer3", "layer4"], "fc:input"),
    "timm convnext_atto": Case(
        timm_model("convnext_atto"), ["stages.0", "stages.1", "stages.2", "stages"], "head.drop:input"
    ),
    "timm vit_tiny": Case(
        timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8),
        TIMM_VIT,
        "head_drop:input",
        size=32,
        prefix_tokens=1,
    ),
    "timm vit_tiny with registers": Case(
        timm_model("vit_tiny_patch16_224", img_size=32, patch_size=8, reg_tokens=4),
        TIMM_VIT,
        "head_drop:input",
        size=32,
        prefix_tokens=5,
    ),
    "timm swin_tiny": Case(
        timm_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4),
        ["layers.0", "layers.1", "layers.2", "norm"],
        "head.drop:input",
    ),
    "BERT": Case(
        huggingface_model("BertForSequenceClassification", "BertConfig", vocab_size=50, **TINY),
        [f"bert.encoder.layer.{i}" for i in (0, 2, 3, 5)],
        "dropout:input",
        inputs=WORDS,
    ),
    "HF ViT": Case(
        huggingface_model("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8, **TINY),
        [f"vit.{HF_VIT}.{i}" for i in (0, 2, 3, 5)],
        "classifier:input",
        inputs={"pixel_values": torch.zeros(2, 3, 32, 32)},
        prefix_tokens=1,
    ),
    "HF Swin": Case(
        huggingface_model(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=128,
            embed_dim=12,
            depths=[1, 1, 2, 1],
            num_heads=[1, 1, 1, 1],
            window_size=4,
        ),
        ["swin.encoder.layers.0.blocks.0", "swin.encoder.layers.1.blocks.0"]
        + ["swin.encoder.layers.2.blocks.1", "swin.encoder.layers.3.blocks.0"],
        "classifier:input",
        inputs={"pixel_values": torch.zeros(2, 3, 128, 128)},
    ),
}
