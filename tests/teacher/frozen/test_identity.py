"""Checksums that tell teachers apart: what is in them and what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from lightning_otrt.reading.tracer import trace
from lightning_otrt.teacher.frozen.identity import checksum_before, stem_checksum

IMAGES = torch.randn(2, 3, 32, 32)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertForSequenceClassification(config)


def unet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 2))


#: Network, matched layers, a parameter that leads to one of them, and parameters that do not.
CASES: list[tuple[Callable[[], nn.Module], tuple[str, ...], str, tuple[str, ...]]] = [
    (torchvision.models.resnet18, ("layer1", "layer3"), "layer3.1.conv2.weight", ("layer4.0.conv1.weight", "fc.bias")),
    (torchvision.models.resnet18, ("fc:input",), "layer4.1.conv2.weight", ("fc.weight",)),
    (torchvision.models.googlenet, ("inception4a",), "inception3b.branch2.0.conv.weight", ("aux1.fc2.weight",)),
    (lambda: timm.create_model("test_vit"), ("blocks.1",), "cls_token", ("head.weight", "norm.weight")),
    (bert, ("bert.encoder.layer.1",), "bert.embeddings.word_embeddings.weight", ("classifier.weight",)),
    (unet, ("1",), "0.bias", ("3.weight",)),
]


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize(("build", "layers", "inside", "outside"), CASES)
def test_what_leads_to_the_layers_counts(
    build: Callable[[], nn.Module], layers: tuple[str, ...], inside: str, outside: tuple[str, ...]
) -> None:
    net = build()
    inputs = torch.arange(12).view(2, 6) if build is bert else torch.randn(2, 3, 160, 160)
    seen = trace(net, (inputs if build is not unet else IMAGES,))
    before = checksum_before(net, layers, seen)
    with torch.no_grad():
        for name in outside:
            net.get_parameter(name).add_(1)
        assert checksum_before(net, layers, seen) == before
        net.get_parameter(inside).add_(1)
    assert checksum_before(net, layers, seen) != before


def test_the_key_is_known_before_a_forward_and_survives_a_new_head() -> None:
    net = torchvision.models.resnet18()
    before = stem_checksum(net)
    net.fc = nn.Linear(512, 3)
    assert stem_checksum(net) == stem_checksum(torch.compile(net)) == before
    nn.init.normal_(net.conv1.weight)
    assert stem_checksum(net) != before
    assert stem_checksum(nn.ReLU()) != stem_checksum(nn.Tanh())
