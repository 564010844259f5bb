"""Where all that leads to the recorded layers is frozen, the error says so and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer


class Split(nn.Module):
    """A backbone and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean((2, 3)))


class Without(Split):
    """Nothing is frozen, but the backbone runs without gradient."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            found = self.backbone(x)
        return self.head(found.mean((2, 3)))


def resnet(_: int) -> nn.Module:
    return torchvision.models.resnet18(num_classes=5)


CASES: dict[str, tuple[Callable[[int], nn.Module], Any, str, str]] = {
    "ResNet, auto": (resnet, "auto", "fc.", r"all 60 parameters .* frozen .*\['fc'\].*`requires_grad_\(True\)`"),
    "ResNet, what enters the head": (resnet, "penultimate", "fc.", r"\['fc:input'\] and all 60 parameters"),
    "a backbone": (Split, "auto", "head.", r"all 4 parameters .*\['head'\].*BackboneFinetuning.*`schedule` of 0"),
    "by name": (Split, {"backbone.0": "backbone.0"}, "head.", r"\['backbone.0'\] and all 2 parameters"),
    "all but what comes later": (Split, {"backbone.0": "backbone.0"}, "backbone.2.", r"all 2 .*\['backbone.2'\]"),
    "without gradient": (Without, "auto", "", "check for `no_grad`"),
}


@pytest.mark.parametrize("name", CASES)
def test_frozen(name: str) -> None:
    build, layers, trained, message = CASES[name]
    student = build(8)
    for own, parameter in student.named_parameters():
        parameter.requires_grad_(own.startswith(trained))
    reports: list[str] = []
    transfer = RepresentationTransfer(build(12), layers)
    transfer.report = reports.append
    with transfer.attached(student):
        student(torch.randn(4, 3, 64, 64))
        with pytest.raises(RuntimeError, match=f"The transfer term is constant: .*{message}"):
            transfer.loss()
    assert ("what leads to them is frozen, or in no module that is called" in reports[0]) == bool(trained)


def test_one_trained_layer_is_enough() -> None:
    student = Split(8)
    student.backbone[0].requires_grad_(False)
    transfer = RepresentationTransfer(Split(12), {"backbone": "backbone"})
    with transfer.attached(student):
        student(torch.randn(4, 3, 16, 16))
        transfer.loss().backward()
    assert student.backbone[2].weight.grad is not None
