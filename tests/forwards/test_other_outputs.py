"""Outputs that are others in training, tokens behind the patches, and frames that lie along the axis of samples."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt import LogitDistillation, RepresentationTransfer


class DeepSupervision(nn.Module):
    """Returns the maps of all its heads in training, and the finest in evaluation mode."""

    def __init__(self, width: int, *, coarse_first: bool = True) -> None:
        super().__init__()
        self.body, self.coarse, self.fine = (
            nn.Conv2d(3, width, 3, padding=1),
            nn.Conv2d(width, 4, 1),
            nn.Conv2d(width, 4, 1),
        )
        self.coarse_first = coarse_first

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = self.body(x).relu()
        maps = [self.coarse(F.avg_pool2d(x, 2)), self.fine(x)]
        return (maps if self.coarse_first else maps[::-1]) if self.training else maps[1]


def distilled(student: nn.Module, select: tuple[int | None, int | None] | None, told: str = "") -> float:
    transfer = RepresentationTransfer(
        DeepSupervision(6), {"body": "body"}, weight=0.0, distillation=LogitDistillation(select=select)
    )
    transfer.teacher.module.load_state_dict(student.state_dict())
    with transfer.attached(student), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            student(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
            value = float(transfer.loss().detach())
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == bool(told), messages
    assert told in "".join(messages)
    return value


def test_the_first_output_in_training_is_another_one() -> None:
    """A copy of the student as teacher is at the distance 0 where the same maps are compared."""
    assert distilled(DeepSupervision(6), None, "in evaluation mode on the same batch") > 1e-4
    assert distilled(DeepSupervision(6), (1, None)) == pytest.approx(0, abs=1e-6)
    assert distilled(DeepSupervision(6, coarse_first=False), None) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("detection_tokens", [5, 20, 100])
def test_learned_tokens_behind_the_patches_are_told(detection_tokens: int) -> None:
    transformers = pytest.importorskip("transformers")

    def build(width: int) -> nn.Module:
        config = transformers.YolosConfig(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=[32, 32],
            patch_size=8,
            num_detection_tokens=detection_tokens,
        )
        return transformers.YolosModel(config, add_pooling_layer=False)

    transfer = RepresentationTransfer(build(24), {"encoder.layer.1": "encoder.layer.1"})
    student = build(16)
    told = r"more than the grid of 4 x 4 patches before it"
    with transfer.attached(student):
        with pytest.warns(UserWarning, match=told):
            student(torch.randn(4, 3, 32, 32))
        transfer.loss()


class Frames(nn.Module):
    """A network of images on each frame, a transformer over the frames, and a mean over those that are no padding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cnn, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, 3)
        self.mix = nn.TransformerEncoderLayer(width, 2, 8, batch_first=True)

    def forward(self, clips: Tensor, attention_mask: Tensor) -> Tensor:
        frames = self.cnn(clips.flatten(0, 1)).relu().mean((2, 3)).unflatten(0, clips.shape[:2])
        frames = self.mix(frames, src_key_padding_mask=attention_mask == 0)
        return self.head((frames * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))


@pytest.mark.parametrize("is_padded", [True, False])
def test_maps_of_padded_frames_are_told(is_padded: bool) -> None:
    transfer, student = RepresentationTransfer(Frames(6), {"cnn": "cnn"}), Frames(4)
    mask = torch.ones(4, 5)
    if is_padded:
        mask[0, 3:] = 0
    with transfer.attached(student), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        student(torch.randn(4, 5, 3, 8, 8), attention_mask=mask)
        transfer.loss()
    assert any("leaves out are read too" in str(warning.message) for warning in caught) == is_padded
