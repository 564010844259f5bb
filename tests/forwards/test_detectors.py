"""Detectors take lists of images: the error names the network inside, and what it says works."""

from __future__ import annotations

import contextlib
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


def detector(name: str, **more: int) -> nn.Module:
    options = {"weights": None, "weights_backbone": None, "num_classes": 3, "min_size": 64, "max_size": 64, **more}
    torch.manual_seed(0)
    return getattr(torchvision.models.detection, name)(**options).train()


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("fasterrcnn_mobilenet_v3_large_fpn", "auto"),
        ("fasterrcnn_mobilenet_v3_large_fpn", "penultimate"),
        pytest.param("retinanet_resnet50_fpn", "blocks", marks=pytest.mark.slow),
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


@pytest.mark.parametrize("boxes", [*(pytest.param(few, marks=pytest.mark.slow) for few in (1, 2)), 3])
def test_the_number_of_boxes_changes_nothing(boxes: int) -> None:
    """It depends on values, down to their rounding, and may be that of the images or of the labels."""
    name, most = "fasterrcnn_mobilenet_v3_large_fpn", {"box_detections_per_img": boxes}
    student = Task(detector(name, **most))
    with (
        pytest.raises(ValueError, match=r"pass student_root='net.backbone'"),
        RepresentationTransfer(detector(name, **most), "blocks").attached(student),
    ):
        student(IMAGES, TARGETS)


@pytest.mark.parametrize(
    ("images", "boxes"), [(2, 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((3, 1), (4, 4)))]
)
def test_the_number_of_images_and_of_labelled_boxes_changes_nothing(images: int, boxes: int) -> None:
    """Each image has three channels, and its boxes are (n, 4): first axes that are no samples."""
    name = "fasterrcnn_mobilenet_v3_large_fpn"
    batch = [torch.rand(3, 64, 64) for _ in range(images)]
    corners = torch.tensor([[4.0, 4.0, 40.0, 40.0], [20.0, 20.0, 60.0, 50.0], [1.0, 2.0, 30.0, 40.0]])
    target = {"boxes": torch.cat([corners, corners])[:boxes], "labels": torch.ones(boxes, dtype=torch.long)}
    with (
        pytest.raises(ValueError, match=r"pass student_root='net.backbone'"),
        RepresentationTransfer(detector(name), "auto").attached(student := Task(detector(name))),
    ):
        student(batch, [target] * images)


class Named(nn.Module):
    """Takes a mapping for each image, as detectron2 does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, items: list[dict[str, Any]]) -> Any:
        return self.net([item["image"] for item in items], [item["target"] for item in items])


@pytest.mark.parametrize("boxes", [1, *(pytest.param(more, marks=pytest.mark.slow) for more in (2, 3))])
def test_images_in_mappings(boxes: int) -> None:
    name, most = "fasterrcnn_mobilenet_v3_large_fpn", {"box_detections_per_img": boxes}
    student = Named(detector(name, **most))
    items = [{"image": image, "target": target} for image, target in zip(IMAGES, TARGETS, strict=True)]
    with (
        pytest.raises(ValueError, match=r"pass student_root='net.backbone'"),
        RepresentationTransfer(Named(detector(name, **most)), "blocks").attached(student),
    ):
        student(items)


def run(student: nn.Module, transfer: RepresentationTransfer) -> None:
    student(IMAGES, TARGETS)
    transfer.loss()


def test_rows_of_boxes_are_warned_of() -> None:
    student = Task(detector("fasterrcnn_mobilenet_v3_large_fpn"))
    transfer = RepresentationTransfer(
        detector("fasterrcnn_mobilenet_v3_large_fpn"), {"net.roi_heads.box_head": "roi_heads.box_head"}, strict=False
    )
    with (
        pytest.warns(UserWarning, match="number of rows that is neither that of the samples"),
        contextlib.suppress(ValueError),  # unless both networks happen to find as many boxes
        transfer.attached(student),
    ):
        run(student, transfer)


@pytest.mark.slow
def test_a_cache_has_no_samples_of_a_list() -> None:
    name = "fasterrcnn_mobilenet_v3_large_fpn"
    student = Task(detector(name))
    layers = {"net.backbone.body.3": "backbone.body.3"}
    transfer = RepresentationTransfer(detector(name), layers, teacher_cache="memory")
    with pytest.raises(ValueError, match="its samples enter as items of a list"), transfer.attached(student):
        student(IMAGES, TARGETS)


@pytest.mark.slow
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
