"""Tokens of videos: the grid of their patches has times, rows and columns, where a convolution shows it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

CLIPS = torch.randn(4, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SIZES = {"image_size": 32, "num_frames": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def videomae(width: int, tubelet: int = 2, patch: int = 8) -> nn.Module:
    sizes = {"tubelet_size": tubelet, "patch_size": patch, "hidden_size": width}
    return transformers.VideoMAEModel(transformers.VideoMAEConfig(**SIZES, **sizes))


def vivit(width: int) -> nn.Module:
    return transformers.VivitModel(transformers.VivitConfig(**SIZES, hidden_size=width, tubelet_size=[2, 8, 8]))


def timesformer(width: int) -> nn.Module:
    return transformers.TimesformerModel(transformers.TimesformerConfig(**SIZES, hidden_size=width, patch_size=8))


class Own(nn.Module):
    """Clips of any length and size, the channels first."""

    def __init__(self, width: int, patch: int = 8) -> None:
        super().__init__()
        self.embed, self.mix = nn.Conv3d(3, width, (2, patch, patch), (2, patch, patch)), nn.Linear(width, width)

    def forward(self, clips: Tensor) -> Tensor:
        return self.mix(self.embed(clips.transpose(1, 2)).flatten(2).mT.tanh())


def by_hand(net: nn.Module, layer: str, clips: Tensor, grid: tuple[int, ...], prefix: int, pooled: Any) -> Tensor:
    kept: list[Any] = []
    module = net.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, __, output: kept.append(output))
    with torch.no_grad():
        net(clips)
    handle.remove()
    output = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    tokens = output[:, prefix:].mT.unflatten(-1, grid)
    cells = nn.functional.adaptive_avg_pool3d(
        tokens, tuple(min(a, b) for a, b in zip(tokens.shape[2:], pooled, strict=True))
    )
    return cells.transpose(0, 1).flatten(1)


#: Student and teacher, the layer, the grid of each, the tokens in front, and the positions that both have.
CASES: dict[str, tuple[nn.Module, nn.Module, str, tuple[int, ...], tuple[int, ...], int, tuple[int, ...]]] = {
    "VideoMAE": (videomae(16), videomae(32), "encoder.layer.1", (2, 4, 4), (2, 4, 4), 0, (2, 4, 4)),
    "VideoMAE, other patches": (
        videomae(16), videomae(32, 1, 16), "encoder.layer.1", (2, 4, 4), (4, 2, 2), 0, (2, 2, 2)
    ),
    "ViViT, a class token in front": (vivit(16), vivit(32), "layers.1", (2, 4, 4), (2, 4, 4), 1, (2, 4, 4)),
    "of its own": (Own(8), Own(12), "mix", (2, 4, 4), (2, 4, 4), 0, (2, 4, 4)),
    "of its own, smaller patches": (Own(8), Own(12, 4), "mix", (2, 4, 4), (2, 8, 8), 0, (2, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_value(name: str) -> None:
    student, teacher, layer, own, other, prefix, positions = CASES[name]
    student.eval()
    teacher.eval()
    transfer = RepresentationTransfer(teacher, {layer: layer}, plan="uniform", weight=1.0)
    with transfer.attached(student):
        student(CLIPS)
        found = float(transfer.loss().detach())
    rows = [by_hand(net, layer, CLIPS, grid, prefix, positions) for net, grid in ((student, own), (teacher, other))]
    expected = (1 - torch.corrcoef(torch.cat(rows))[: len(rows[0]), len(rows[0]) :]).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_clips_of_another_size_later() -> None:
    student, teacher = Own(8), Own(12)
    transfer = RepresentationTransfer(teacher, {"mix": "mix"}, plan="uniform", weight=1.0, memory=0)
    later = torch.randn(4, 6, 3, 40, 24)
    with transfer.attached(student):
        student(CLIPS)
        transfer.loss()
        student(later)
        found = float(transfer.loss().detach())
    rows = [by_hand(net, "mix", later, (3, 5, 3), 0, (3, 4, 3)) for net in (student, teacher)]
    expected = (1 - torch.corrcoef(torch.cat(rows))[:8, 8:]).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_frames_that_are_images_of_their_own() -> None:
    """Its tokens are the patches of all frames, each with its times: a sequence without the class token."""
    student, teacher = timesformer(16).eval(), timesformer(32).eval()
    layer = "encoder.layer.1"
    transfer = RepresentationTransfer(teacher, {layer: layer}, plan="uniform", weight=1.0)
    with transfer.attached(student):
        with pytest.warns(UserWarning, match="has the patches of 4 frames, each of 4 x 4, and it is not known whether"):
            student(CLIPS)
        found = float(transfer.loss().detach())
    rows = [by_hand(net, layer, CLIPS, (64, 1, 1), 1, (16, 1, 1)) for net in (student, teacher)]
    expected = (1 - torch.corrcoef(torch.cat(rows))[:16, 16:]).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)


class FrameNetwork(nn.Module):
    """Convolutions on each frame, then a recurrent network or a transformer over what they give for all frames."""

    def __init__(self, width: int, over_time: str) -> None:
        super().__init__()
        self.cnn, self.over_time = nn.Sequential(nn.Conv2d(3, width, 16, 16), nn.Tanh()), over_time
        builds = {
            "lstm": lambda: nn.LSTM(width, width, batch_first=True),
            "gru": lambda: nn.GRU(width, width, batch_first=True),
            "transformer": lambda: nn.TransformerEncoderLayer(width, 2, 8, batch_first=True),
        }
        self.rnn, self.head = builds[over_time](), nn.Linear(width, 3)

    def forward(self, clips: Tensor) -> Tensor:
        maps = self.cnn(clips.flatten(0, 1)).flatten(2).mT.reshape(len(clips), -1, self.head.in_features)
        found = self.rnn(maps)
        return self.head((found if self.over_time == "transformer" else found[0]).mean(1))


@pytest.mark.parametrize("over_time", ["lstm", "gru", "transformer"])
@pytest.mark.parametrize("side", [16, 32])
def test_frames_of_one_patch_have_one_order(side: int, over_time: str) -> None:
    """Whether frames or patches come first is only a question where a frame has several patches."""
    told = f"has the patches of 4 frames, each of {side // 16} x {side // 16}, and it is not known whether"
    student, teacher = FrameNetwork(8, over_time), FrameNetwork(12, over_time)
    transfer = RepresentationTransfer(teacher, {"rnn": "rnn"})
    with transfer.attached(student), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        student(CLIPS[..., :side, :side])
        transfer.loss()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (0 if side == 16 else 2), messages
    assert all(told in message for message in messages)


def test_a_video_and_an_image() -> None:
    """Patches of clips and of frames have other positions."""

    class Frames(Own):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.embed = nn.Conv2d(3, width, 8, 8)  # type: ignore[assignment]

        def forward(self, clips: Tensor) -> Tensor:
            return self.mix(self.embed(clips[:, 0]).flatten(2).mT.tanh())

    transfer = RepresentationTransfer(Frames(12), {"mix": "mix"})
    student = Own(8)
    with transfer.attached(student):
        student(CLIPS)
        with pytest.raises(ValueError, match="the positions cannot be paired"):
            transfer.loss()
