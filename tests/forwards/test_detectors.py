"""Detectors take lists of images: the error names the network inside, and what it says works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

torchvision = pytest.importorskip("torchvision")
IMAGES = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(number)) for number in range(2)]
TARGETS = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])} for _ in IMAGES]


class Task(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: list[Tensor], targets: Any) -> Any:
        return self.net(images, targets)


def detector(name: str) -> nn.Module:
    options = {"weights": None, "weights_backbone": None, "num_classes": 3, "min_size": 64, "max_size": 64}
    torch.manual_seed(0)
    return getattr(torchvision.models.detection, name)(**options).train()


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("fasterrcnn_mobilenet_v3_large_fpn", "auto"),
        ("fasterrcnn_mobilenet_v3_large_fpn", "penultimate"),
        ("retinanet_resnet50_fpn", "blocks"),
    ],
)
def test_error(name: str, layers: str) -> None:
    student = Task(detector(name))
    transfer = RepresentationTransfer(detector(name), layers)
    with (
        pytest.raises(
            ValueError, match=r"'net.backbone' \(BackboneWithFPN\) .* pass student_root='net.backbone'"
        ) as caught,
        transfer.attached(student),
    ):
        student(IMAGES, TARGETS)
    assert len(str(caught.value)) < 600


def test_what_the_error_says_works() -> None:
    name = "fasterrcnn_mobilenet_v3_large_fpn"
    student = Task(detector(name))
    transfer = RepresentationTransfer(detector(name), "auto", student_root="net.backbone", plan="uniform")
    with transfer.attached(student):
        losses = student(IMAGES, TARGETS)
        loss = transfer.loss()
        (loss + sum(losses.values())).backward()
    assert float(loss.detach()) > 0
    assert all(pair.student.startswith("net.backbone.") for pair in transfer.pairs)
