"""Positions that each network picks by scores of its own, such as the queries of a detector, are told."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

PICKS = "hold positions that a network picks by scores of its own"
QUERIES = 5


class Picking(nn.Module):
    """Reads a sequence, picks some of its positions, and goes on with these.

    Args:
        width: Number of neurons.
        kind: How it picks.
    """

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind, self.embed, self.score = kind, nn.Linear(3, width), nn.Linear(width, 1)
        self.learned = nn.Parameter(torch.randn(1, QUERIES, width))
        self.place, self.decoder, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).tanh()
        scores = self.score(h)[..., 0]
        index = scores.topk(QUERIES, dim=1).indices
        wide = index[..., None].expand(-1, -1, h.shape[-1])
        samples = torch.arange(len(x))[:, None]
        queries = {
            "gather": lambda: h.gather(1, wide),
            "index": lambda: h[samples, index],
            "sort": lambda: h.gather(1, scores.argsort(1)[:, :QUERIES, None].expand_as(wide)),
            "in order": lambda: h.gather(1, index.sort(1).values[..., None].expand_as(wide)),
            "with another": lambda: torch.cat([self.learned[:, :1].expand(len(x), -1, -1), h.gather(1, wide)], 1),
            "places": lambda: self.learned + self.place(h.gather(1, wide)),
            "learned": lambda: self.learned.expand(len(x), -1, -1) + h.mean(1, keepdim=True),
            "first": lambda: h[:, :QUERIES],
            "constant": lambda: h.gather(1, torch.arange(QUERIES)[None, :, None].expand_as(wide)),
            "by inputs": lambda: h.gather(1, x[..., 0].topk(QUERIES, 1).indices[..., None].expand_as(wide)),
            "all": lambda: h.gather(1, scores.argsort(1)[..., None].expand_as(h)),
            "put back": lambda: h.scatter(1, wide, h.gather(1, wide) + 1),
        }[self.kind]()
        return self.head(self.decoder(queries).tanh().mean(1))


def told(student: nn.Module, teacher: nn.Module, layers: Any = ("decoder",), **options: Any) -> list[str]:
    """The warnings of such positions."""
    transfer = RepresentationTransfer(teacher, [*layers], plan="uniform", **options)
    with warnings.catch_warnings(record=True) as noted, transfer.attached(student):
        warnings.simplefilter("always")
        student(torch.randn(4, 12, 3, generator=torch.Generator().manual_seed(0)))
        transfer.loss()
    return [str(each.message) for each in noted if PICKS in str(each.message)]


def networks(*kinds: str) -> list[Picking]:
    torch.manual_seed(0)
    return [Picking(width, kind) for width, kind in zip((6, 10), kinds, strict=True)]


@pytest.mark.parametrize("kind", ["gather", "index", "sort", "in order", "with another", "places"])
def test_a_warning_of_picked_positions(kind: str) -> None:
    (message,) = told(*networks(kind, kind))
    assert "'decoder -> decoder'" in message
    assert "the same in" in message


@pytest.mark.parametrize("kind", ["learned", "first", "constant", "by inputs", "all", "put back"])
def test_no_word_on_others(kind: str) -> None:
    """An order that all positions have after a sort may be undone later, so that nothing is said of that, either."""
    assert told(*networks(kind, kind)) == []


def test_one_side_is_enough() -> None:
    assert len(told(*networks("learned", "gather"))) == 1


def test_a_copy_picks_the_same() -> None:
    student, _ = networks("gather", "gather")
    assert told(student, copy.deepcopy(student)) == []


def test_what_it_says_helps() -> None:
    assert told(*networks("gather", "gather"), layers=["embed"]) == []
    assert told(*networks("gather", "gather"), grid=1) == []


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("is_trained", [False, True])
def test_rt_detr(is_trained: bool) -> None:
    """Without training it gives all positions one score, and both networks pick the same ones in all samples."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[8] * 3, encoder_layers=1,
        encoder_ffn_dim=16, encoder_attention_heads=2, d_model=16, decoder_layers=2, decoder_attention_heads=2,
        decoder_ffn_dim=16, num_queries=6, decoder_in_channels=[16] * 3, num_labels=3, num_denoising=0,
        anchor_image_size=None,
    )  # fmt: skip
    torch.manual_seed(0)
    student, teacher = (transformers.RTDetrForObjectDetection(config) for _ in range(2))
    for name, parameter in (*student.named_parameters(), *teacher.named_parameters()):
        if is_trained and "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    images = torch.randn(3, 3, 64, 64)
    for layers, count in (("auto", 1), (["model.decoder_input_proj.1"], 0)):
        transfer = RepresentationTransfer(teacher, layers)
        with warnings.catch_warnings(record=True) as noted, transfer.attached(student):
            warnings.simplefilter("always")
            student(images)
            transfer.loss()
        found = [str(each.message) for each in noted if PICKS in str(each.message)]
        assert len(found) == count
        assert not found or ("model.decoder.layers.0" in found[0] and "'model.decoder_input_proj.1'" in found[0])
