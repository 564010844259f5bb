"""The students, and the sentence encoder as a teacher."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from benchmarks.real.checkpoints import minilm

#: Tokens of a text.
LENGTH = 48
#: Words that MiniLM's tokenizer knows.
_VOCABULARY = 30522


class ResNet10(nn.Module):
    """A ResNet of torchvision's basic blocks, one in each of four stages, and narrow.

    Args:
        num_classes: Outputs.
        widths: Channels of the stem and of the stages.
    """

    def __init__(self, num_classes: int, widths: Sequence[int] = (32, 32, 64, 128, 256)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 5, 2, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        strides = (1, 2, 2, 2)
        self.layer1, self.layer2, self.layer3, self.layer4 = map(_stage, widths, widths[1:], strides)
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """From images (B, 3, H, W) to logits."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


def _stage(channels: int, width: int, stride: int) -> nn.Sequential:
    if stride == 1 and channels == width:
        return nn.Sequential(BasicBlock(channels, width))
    shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
    return nn.Sequential(BasicBlock(channels, width, stride, shortcut))


def mobilenet(num_classes: int) -> nn.Module:
    """MobileNetV2 of width 0.35, untrained."""
    timm: Any = importlib.import_module("timm")
    net: nn.Module = timm.create_model("mobilenetv2_035", num_classes=num_classes)
    return net


class MeanPooled(nn.Module):
    """A BERT whose tokens are averaged, padding left out; with a linear head where there are classes.

    Args:
        bert: A model of transformers.
        num_classes: Outputs of the head; 0: no head, the mean is the output.
        width: Neurons of the mean.
    """

    def __init__(self, bert: nn.Module, num_classes: int = 0, width: int = 0) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """From tokens (B, T) to logits (B, num_classes), or to the mean (B, neurons)."""
        tokens = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        valid = attention_mask[..., None].to(tokens.dtype)
        return self.head((tokens * valid).sum(1) / valid.sum(1))


def bert(num_classes: int, layers: int, width: int, heads: int) -> nn.Module:
    """A small BERT without weights."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=LENGTH + 16,
    )
    return MeanPooled(transformers.BertModel(config, add_pooling_layer=False), num_classes, width)


def sentence_encoder() -> nn.Module:
    """all-MiniLM-L6-v2 with the mean over tokens that it was trained with; its embedding is its output."""
    return MeanPooled(minilm()[0]).eval()
