"""Padding that no mask of the layer tells: masks of documents, and the ``padding_idx`` of an embedding."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer

SAMPLES, LONGEST = 6, 9
FIRST = torch.arange(LONGEST) < torch.tensor([[3], [9], [5], [4], [7], [6]])
WORDS = seeded(0, torch.randint, 1, 50, (SAMPLES, LONGEST))


def _told(student: nn.Module, teacher: nn.Module, *args: Any, layer: str = "mix", **options: Any) -> list[str]:
    transfer = RepresentationTransfer(teacher, [LayerPair(layer, layer, **options)], weight=1.0, plan="uniform")
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        student(*args)
        transfer.loss()
    return [str(warning.message) for warning in caught]


class Documents(nn.Module):
    """Sentences become rows; the layers of words get no mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, width), nn.Linear(width, width)
        self.sentences, self.head = nn.GRU(width, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        rows, valid = words.flatten(0, 1), attention_mask.flatten(0, 1)[..., None].float()
        means = (self.mix(self.embed(rows)) * valid).sum(1) / valid.sum(1).clamp_min(1)
        return self.head(self.sentences(means.view(*words.shape[:2], -1))[0].mean(1))


@pytest.mark.parametrize("sentences", [4, LONGEST])
def test_a_mask_of_documents(sentences: int) -> None:
    words = seeded(1, torch.randint, 1, 50, (SAMPLES, sentences, LONGEST))
    valid = torch.arange(LONGEST) < seeded(2, torch.randint, 2, LONGEST, (SAMPLES, sentences, 1))
    messages = _told(Documents(8), Documents(12), words, valid.long())
    for side, message in zip(("student", "teacher"), messages, strict=True):
        assert message.startswith(f"The mask 'attention_mask' of the {side} has the shape {tuple(valid.shape)}")
        assert "its layers ['mix']" in message
    assert _told(Documents(8), Documents(12), words, valid.long(), mask=None) == []
    if sentences != LONGEST:  # such a mask without padding may say which token sees which, and a later batch has some
        assert _told(Documents(8), Documents(12), words, torch.ones_like(valid).long()) == []


class Items(nn.Module):
    """Makes its mask of the ids, as recommenders do."""

    def __init__(self, width: int, padding: int | None = 0) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, width, padding_idx=padding), nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, items: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        valid = (items != 0)[..., None]
        return self.head((self.mix(self.embed(items)) * valid).sum(1))


IN_FRONT, BEHIND = WORDS * FIRST.flip(1), WORDS * FIRST
IN_BETWEEN = WORDS.clone().index_fill_(1, torch.tensor([4]), 0)


PADDED = {
    "the start": IN_FRONT,
    "the end": BEHIND,
    "both ends": torch.where(torch.arange(SAMPLES)[:, None] < 3, IN_FRONT, BEHIND),
}


@pytest.mark.parametrize("place", PADDED)
def test_padding_of_an_embedding(place: str) -> None:
    items = PADDED[place]
    messages = _told(Items(8), Items(12), items)
    assert len(messages) == 2
    assert all(f"gets its padding_idx at {place} of some samples" in text for text in messages)
    assert all("The embedding 'embed'" in text and "layers ['mix']: their padding is read" in text for text in messages)
    assert _told(Items(8), Items(12), items, mask=None) == []


@pytest.mark.parametrize(
    ("padding", "args"),
    [
        (None, (BEHIND,)),
        (0, (WORDS,)),
        (0, (IN_BETWEEN,)),
        (0, (WORDS.clone().index_fill_(1, torch.tensor([0]), 0),)),  # each decoder starts with it
        (0, (BEHIND, FIRST.long())),
    ],
    ids=["no padding_idx", "no padding", "an item like others", "a first token", "with a mask"],
)
def test_nothing_is_told(padding: int | None, args: tuple[Any, ...]) -> None:
    assert _told(Items(8, padding), Items(12, padding), *args) == []


@pytest.mark.parametrize(("name", "layer"), [("BertModel", "encoder.layer.1"), ("RobertaModel", "encoder.layer.1")])
def test_real_networks(name: str, layer: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name.replace("Model", "Config"))

    def build(width: int) -> nn.Module:
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}
        return getattr(transformers, name)(config(hidden_size=width, pad_token_id=0, **sizes)).eval()

    assert [text for text in _told(build(8), build(12), BEHIND, layer=layer) if "padding_idx" in text]
    assert not [text for text in _told(build(8), build(12), BEHIND, FIRST.long(), layer=layer) if "padding" in text]


class Series(nn.Module):
    """Averages its positions with weights of one for valid ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.mix, self.head = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)

    def average(self, x: Tensor, valid: Tensor) -> Tensor:
        return self.head((self.mix(self.enter(x.nan_to_num())) * valid[..., None]).sum(1))


class Padded(Series):
    def forward(self, x: Tensor, is_pad: Tensor) -> Tensor:
        return self.average(x, ~is_pad)


class Kept(Series):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.average(x, keep)


class InTuple(Series):
    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.average(*batch)


class FromNan(Series):
    def forward(self, x: Tensor) -> Tensor:
        return self.average(x, ~x.isnan().all(-1))


class Counted(Series):
    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        return self.average(x, torch.arange(x.shape[1]) < sizes[:, None])


class Step(nn.Module):
    """A layer with a mask of its own name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.linear(x) + 0 * bias.clamp_min(-1).flatten(1)[..., None]


class MadeInside(nn.Module):
    """Makes its mask of the ids, and passes it on to its layers to be added to scores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(50, width), Step(width), nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        bias = torch.zeros(ids.shape).masked_fill(ids == 0, float("-inf"))[:, None, None]
        return self.head(self.mix(self.embed(ids), bias).mean(1))


class Biased(Series):
    """Gets what is added to scores, for each head."""

    def forward(self, x: Tensor, attn_bias: Tensor) -> Tensor:
        return self.average(x, torch.ones(x.shape[:2])) + 0 * attn_bias.clamp_min(-1).sum((1, 2, 3))[:, None]


class TimeFirst(nn.Module):
    """Recurrent, with samples along the second axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.head = nn.GRU(5, width), nn.Linear(width, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.mix(x)[0] * mask[..., None]).sum(0))


class TimeFirstKept(TimeFirst):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return super().forward(x, keep)


class KeptInside(nn.Module):
    """Finds out itself which positions were padded by zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.head = nn.GRU(5, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        keep = x.abs().sum(-1) > 0
        return self.head((self.mix(x)[0] * keep[..., None]).sum(1) / keep.sum(1, keepdim=True))


class KeptTimeFirst(KeptInside):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.mix = nn.GRU(5, width)

    def forward(self, x: Tensor) -> Tensor:
        keep = x.abs().sum(-1) > 0
        return self.head((self.mix(x)[0] * keep[..., None]).sum(0))


class KeptChannelsFirst(KeptInside):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.mix = nn.Conv1d(5, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.mix(x) * (x.abs().sum(1, keepdim=True) > 0)).sum(2))


class KeptSingle(KeptInside):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.mix = nn.GRU(1, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.mix(x[..., None])[0] * (x != 0)[..., None]).sum(1))


SERIES = seeded(3, torch.randn, SAMPLES, LONGEST, 5)
SEEN = torch.zeros(SAMPLES, 2, LONGEST, LONGEST).masked_fill(~FIRST[:, None, None], -1e9)
CAUSAL = torch.full((LONGEST, LONGEST), -1e9).triu(1)
ZEROS_BEHIND = SERIES * FIRST[..., None]
NAN_BEHIND = SERIES.masked_fill(~FIRST[..., None], float("nan"))
SCATTERED = seeded(4, torch.rand, SAMPLES, LONGEST) > 0.5


@pytest.mark.parametrize(
    ("kind", "args", "said"),
    [
        (Padded, (SERIES, ~FIRST), "The argument 'is_pad' of the {} may be the padding mask of its layers ['mix']"),
        (Padded, (SERIES, ~FIRST.flip(1)), "The argument 'is_pad' of the {} may be the padding mask"),
        (Kept, (SERIES, FIRST.float()), "The argument 'keep' of the {} may be the padding mask of its layers ['mix']"),
        (InTuple, ((SERIES, FIRST),), "The argument 'batch[1]' of the {} may be the padding mask"),
        (InTuple, ([SERIES, FIRST],), "The argument 'batch[1]' of the {} may be the padding mask"),
        (FromNan, (NAN_BEHIND,), "The argument 'x' of the {} is NaN at the end of some samples"),
        (FromNan, (SERIES * FIRST[..., None],), "The argument 'x' of the {} is 0 at the end of some samples"),
        (FromNan, (SERIES * FIRST.flip(1)[..., None],), "The argument 'x' of the {} is 0 at the start of some samples"),
        (
            KeptInside,
            (ZEROS_BEHIND,),
            "The argument 'x' of the {} is 0 at the end of some samples, as padded series are",
        ),
        (KeptTimeFirst, (ZEROS_BEHIND.movedim(1, 0),), "The argument 'x' of the {} is 0 at the end of some samples"),
        (KeptChannelsFirst, (ZEROS_BEHIND.mT,), "The argument 'x' of the {} is 0 at the end of some samples"),
        (KeptSingle, (ZEROS_BEHIND[..., 0],), "The argument 'x' of the {} is 0 at the end of some samples"),
        (
            Counted,
            (SERIES, FIRST.sum(1)),
            "The argument 'sizes' of the {} may give the number of valid positions of the layers",
        ),
        (Biased, (SERIES, SEEN), "The argument 'attn_bias' of the {} may be the padding mask of its layers ['mix']"),
        (Biased, (SERIES, SEEN + CAUSAL), "The argument 'attn_bias' of the {} may be the padding mask"),
        (MadeInside, (BEHIND,), "The argument 'bias' of 'mix' may be the padding mask of the {} layers ['mix']"),
        (TimeFirst, (SERIES.movedim(1, 0), FIRST.T), "The argument 'mask' of the {} may be the padding mask"),
        (TimeFirstKept, (SERIES.movedim(1, 0), FIRST.T), "The argument 'keep' of the {} may be the padding mask"),
    ],
    ids=[
        "flags of padding",
        "padding in front",
        "floats",
        "in a tuple",
        "in a list",
        "NaN",
        "zeros behind",
        "zeros in front",
        "zeros that the network finds",
        "zeros, time first",
        "zeros, channels first",
        "zeros of one channel",
        "lengths",
        "bias of scores",
        "bias of scores, causal",
        "made inside",
        "a mask of time first",
        "flags of time first",
    ],
)
def test_padding_that_values_show(kind: type[Series], args: tuple[Any, ...], said: str) -> None:
    messages = _told(kind(8), kind(12), *args)
    assert len(messages) == 2
    for side, message in zip(("student", "teacher"), messages, strict=True):
        assert message.startswith(said.format(side))
        assert "LayerPair" in message
    assert _told(kind(8), kind(12), *args, mask=None) == []


@pytest.mark.parametrize(("kind", "name", "flags"), [(Padded, "~is_pad", ~FIRST), (Kept, "keep", FIRST.float())])
def test_a_name_tells_what_they_mean(kind: type[Series], name: str, flags: Tensor) -> None:
    assert _told(kind(8), kind(12), SERIES, flags, mask=name) == []


class Masked(Series):
    def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
        return self.average(x, torch.ones(x.shape[:2]))


@pytest.mark.parametrize("kind", [Kept, Masked])
@pytest.mark.parametrize("diagonal", [0, -1])
def test_a_causal_mask_of_as_many_tokens_as_samples(kind: type[Series], diagonal: int) -> None:
    seen = torch.ones(SAMPLES, SAMPLES).tril(diagonal)
    for mask in (seen, seen.bool(), ~seen.bool(), seen.T, torch.zeros_like(seen).masked_fill(seen == 0, -torch.inf)):
        assert _told(kind(8), kind(12), SERIES[:, :SAMPLES], mask) == []


def test_rows_of_images_with_a_border_are_no_padding() -> None:
    rows = torch.zeros(SAMPLES, LONGEST, 5)
    for sample, (first, last) in enumerate([(1, 8), (2, 7), (3, 8), (1, 6), (2, 9), (0, 8)]):
        rows[sample, first:last] = 1.0
    assert _told(FromNan(8), FromNan(12), rows) == []


def test_a_causal_bias_alone_is_no_padding() -> None:
    assert _told(Biased(8), Biased(12), SERIES, CAUSAL.expand(SAMPLES, 2, -1, -1)) == []


@pytest.mark.parametrize(
    "series",
    [
        SERIES,
        SERIES * SCATTERED[..., None],
        SERIES * FIRST[:1, :, None],
        SERIES * torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]),
        SERIES.masked_fill(~FIRST[..., None] & (torch.arange(5) > 0), 0.0),
        ZEROS_BEHIND[[1, 1, 1, 1, 1, 1]],
    ],
    ids=["none", "scattered", "all alike", "channels", "some channels", "no padding"],
)
def test_zeros_that_are_no_padding(series: Tensor) -> None:
    assert _told(KeptInside(8), KeptInside(12), series) == []
    assert _told(KeptChannelsFirst(8), KeptChannelsFirst(12), series.mT) == []


def test_numbers_that_are_no_lengths() -> None:
    assert _told(Counted(8), Counted(12), SERIES, torch.tensor([3, 8, 5, 4, 7, 6])) == []


@pytest.mark.parametrize(
    "flags",
    [SCATTERED, SCATTERED.float(), FIRST[1:2].expand(SAMPLES, -1), FIRST[:1].expand(SAMPLES, -1), FIRST.float() * 0.5],
    ids=["scattered", "scattered floats", "all", "one for all samples", "other numbers"],
)
def test_flags_that_are_no_padding(flags: Tensor) -> None:
    assert _told(Kept(8), Kept(12), SERIES, flags) == []
