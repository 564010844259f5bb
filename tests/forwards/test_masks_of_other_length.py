"""Masks whose names do not tell what they mean, at layers that have fewer tokens than their sequence."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer

SAMPLES, LONGEST, LAG = 6, 12, 2
FIRST = torch.arange(LONGEST) < torch.tensor([[6], [12], [8], [7], [10], [9]])
SERIES, BESIDE = (seeded(seed, torch.randn, SAMPLES, length, 5) for seed, length in ((0, LONGEST), (1, 8)))
IMAGES, WORDS = seeded(2, torch.randn, SAMPLES, 3, 16, 16), seeded(3, torch.randint, 1, 50, (SAMPLES, LONGEST))
SCATTERED = seeded(4, torch.rand, SAMPLES, LONGEST) > 0.5


def _told(student: nn.Module, teacher: nn.Module, layer: str, *args: Any, mask: str | None = "auto") -> list[str]:
    transfer = RepresentationTransfer(teacher, [LayerPair(layer, layer, mask=mask)], weight=1.0, plan="uniform", grid=1)
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        student(*args)
        transfer.loss()
    return [str(warning.message) for warning in caught]


class Lags(nn.Module):
    """A series with its own past as features, which has fewer positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.mix, self.head = nn.Linear(10, width), nn.Linear(width, width), nn.Linear(width, 3)

    def encode(self, series: Tensor) -> Tensor:
        return self.mix(self.enter(torch.cat([series[:, LAG:], series[:, :-LAG]], 2)))

    def forward(self, past_values: Tensor, past_observed_mask: Tensor) -> Tensor:
        return self.head(self.encode(past_values * past_observed_mask[..., None]).mean(1))


class LagsAndOthers(Lags):
    """The same beside another series, whose own layers come first."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.other = nn.Linear(5, width)

    def forward(self, past_values: Tensor, beside: Tensor, past_observed_mask: Tensor) -> Tensor:
        other = self.other(beside).mean(1)
        return self.head(self.encode(past_values * past_observed_mask[..., None]).mean(1) + other)


class Strided(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv1d(5, width, 3, 2, 1), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.mix(self.conv(x.transpose(1, 2)).transpose(1, 2))[0].mean(1))


@pytest.mark.parametrize("mask", [FIRST, FIRST.flip(1), FIRST.long(), FIRST.float(), ~FIRST], ids=str)
@pytest.mark.parametrize("kind", [Lags, Strided])
def test_a_mask_of_another_length(kind: type[nn.Module], mask: Tensor) -> None:
    messages, name = _told(kind(8), kind(11), "mix", SERIES, mask.to(mask.dtype)), "past_observed_mask"
    for message in messages:
        assert message.startswith("Padding is not left out of the ")
        assert (
            f"the mask {name if kind is Lags else 'mask'!r} of 'the network' with shape (6, 12) has another" in message
        )
    assert len(messages) == 2
    assert _told(kind(8), kind(11), "mix", SERIES, mask, mask=None) == []


@pytest.mark.parametrize("mask", [SCATTERED, FIRST[:1].expand(SAMPLES, -1), torch.ones(SAMPLES, LONGEST)], ids=str)
def test_a_mask_of_no_padding(mask: Tensor) -> None:
    assert _told(Lags(8), Lags(11), "mix", SERIES, mask) == []


def test_another_series_beside_it() -> None:
    messages = _told(LagsAndOthers(8), LagsAndOthers(11), "mix", SERIES, BESIDE, FIRST)
    assert len(messages) == 2
    assert all("the mask 'past_observed_mask'" in text and "has another length" in text for text in messages)
    assert _told(LagsAndOthers(8), LagsAndOthers(11), "other", SERIES, BESIDE, FIRST) == []


@pytest.mark.slow
def test_time_series_of_hugging_face() -> None:
    tf = pytest.importorskip("transformers")
    parts = {f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    parts |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "lags_sequence": [1, 2], "num_time_features": 1}
    config = {"prediction_length": 4, "context_length": LONGEST - 2, **parts}
    student, teacher = (
        tf.TimeSeriesTransformerForPrediction(tf.TimeSeriesTransformerConfig(d_model=width, **config)).eval()
        for width in (8, 12)
    )
    past, future = seeded(5, torch.randn, SAMPLES, LONGEST), seeded(6, torch.randn, SAMPLES, 4)
    given = past, past[..., None], FIRST.flip(1).float(), None, None, future, future[..., None]
    messages = _told(student, teacher, "model.encoder.layers.1", *given)
    assert len(messages) == 2
    assert all("the mask 'past_observed_mask'" in text and "has another length" in text for text in messages)
    assert _told(student, teacher, "model.decoder.layers.1", *given) == []  # the future has no padding
    scattered = (*given[:2], SCATTERED.float(), *given[3:])
    assert _told(student, teacher, "model.encoder.layers.1", *scattered) == []


class Conditioned(nn.Module):
    """Tokens of an image that a text changes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches, self.embed = nn.Conv2d(3, width, 4, 4), nn.Embedding(50, width)
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, image: Tensor, ids: Tensor, text_mask: Tensor) -> Tensor:
        text = (self.embed(ids) * text_mask[..., None]).mean(1, keepdim=True)
        return self.head(self.mix(self.patches(image).flatten(2).transpose(1, 2) + text).mean(1))


class Latents(nn.Module):
    """Latent vectors that look at a series."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.latents = nn.Linear(5, 8), nn.Parameter(torch.randn(1, 4, 8))
        self.look, self.mix = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.enter(x)
        seen, _ = self.look(self.latents.expand(len(x), -1, -1), x, x, key_padding_mask=~mask)
        return self.head(self.mix(seen).mean(1))


class Channels(nn.Module):
    """Takes the channels of a series as tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.head = nn.Sequential(nn.Linear(LONGEST, width), nn.ReLU()), nn.Linear(width, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.mix((x * mask[..., None]).transpose(1, 2)).mean(1))


@pytest.mark.parametrize(
    ("kind", "args"),
    [(Conditioned, (IMAGES, WORDS, FIRST)), (Latents, (SERIES, FIRST)), (Channels, (SERIES, FIRST))],
)
def test_tokens_that_are_not_of_the_sequence(kind: type[nn.Module], args: tuple[Any, ...]) -> None:
    assert [text for text in _told(kind(8), kind(11), "mix", *args) if "another length" in text] == []


class Counted(LagsAndOthers):
    """Counts its forwards."""

    runs: ClassVar[list[int]] = []

    def forward(self, past_values: Tensor, beside: Tensor, past_observed_mask: Tensor) -> Tensor:
        self.runs.append(1)
        return super().forward(past_values, beside, past_observed_mask)


def test_no_forward_more_where_nothing_is_padded() -> None:
    counts = []
    for mask in (SCATTERED, FIRST):
        Counted.runs.clear()
        _told(LagsAndOthers(8), Counted(11), "mix", SERIES, BESIDE, mask)
        counts.append(len(Counted.runs))
    assert counts[1] - counts[0] == 4
