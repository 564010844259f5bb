"""Residual networks of torchvision with fewer neurons."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchvision.models.resnet import ResNet


class NarrowResNet(ResNet):
    """With a quarter of the neurons, but for stages of ``whole`` neurons.

    Args:
        block: See :class:`torchvision.models.resnet.ResNet`.
        layers: Blocks of each stage.
        num_classes: Number of classes.
        whole: Number of neurons of the stages that are left as they are.
    """

    def __init__(self, block: Any, layers: list[int], num_classes: int = 1000, *, whole: int = 0) -> None:
        self.whole = whole
        super().__init__(block, layers)
        self.fc = nn.Linear(self.inplanes, num_classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        return super()._make_layer(block, planes if planes == self.whole else planes // 4, *args, **options)
