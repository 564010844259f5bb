"""Masks that the first batch does not have, or that leave out nothing there: later batches are read with theirs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from forwards.masked import BERT, LONGEST, SAMPLES, VALID, WORDS
from forwards.masked_terms import run
from forwards.test_masks_between_sequences import ADDED, CAUSAL, LLAMA, PACKED, SEEN, Attention
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

FULL = torch.ones(SAMPLES, LONGEST, LONGEST, dtype=torch.bool)


class ByMapping(nn.Module):
    """It takes a whole batch, whose keys may differ."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, width), nn.Linear(width, width)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.mix(self.embed(batch["words"]))


class AnyArguments(ByMapping):
    """The names of its arguments are not in its signature."""

    def forward(self, words: Tensor | Mapping[str, Tensor], **others: Tensor) -> Tensor:
        return self.mix(self.embed(words["words"] if isinstance(words, Mapping) else words))


class Positions(ByMapping):
    """A name that libraries give to masks of both meanings."""

    def forward(self, words: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.mix(self.embed(words))


class Inside(ByMapping):
    """The mask is made inside, and has such a name there."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.mix = nn.Linear(width, width)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.mix(x)

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.block = self.Block(width)

    def forward(self, words: Tensor) -> Tensor:  # type: ignore[override]
        return self.block(self.embed(words), words != 0)


class Lengths(ByMapping):
    """Lengths in place of a mask."""

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        return self.mix(self.embed(words))


CASES: dict[str, tuple[Any, tuple[Any, ...], tuple[Any, ...], str]] = {
    "pairwise, none": (Attention, (WORDS,), (WORDS, SEEN), "mix"),
    "pairwise, None": (Attention, (WORDS, None), (WORDS, SEEN[:, None]), "mix"),
    "pairwise, all seen": (Attention, (WORDS, FULL), (WORDS, SEEN), "mix"),
    "pairwise, causal": (Attention, (WORDS, CAUSAL.expand(SAMPLES, -1, -1)), (WORDS, SEEN), "mix"),
    "pairwise, numbers": (Attention, (WORDS, FULL.long()), (WORDS, SEEN.long()), "mix"),
    "pairwise, added": (Attention, (WORDS,), (WORDS, ADDED), "mix"),
    "rows, then pairwise": (BERT, (WORDS, torch.ones_like(WORDS)), (WORDS, VALID.long()), "encoder.layer.1"),
    "BERT, none": (BERT, (WORDS,), (WORDS, VALID.long()), "encoder.layer.1"),
    "Llama, pairwise": (LLAMA, (WORDS,), (WORDS, SEEN[:, None]), "model.layers.1"),
    "a key of a mapping": (
        ByMapping, ({"words": WORDS},), ({"words": WORDS, "attention_mask": VALID.long()},), "mix"
    ),
    "a key after padding": (ByMapping, ({"words": WORDS},), ({"words": WORDS, "padding_mask": ~VALID},), "mix"),
    "a mapping, or arguments": (
        AnyArguments, ({"words": WORDS},), ({"words": WORDS, "attention_mask": VALID.long()},), "mix"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_later_padding_is_left_out(name: str) -> None:
    build, first, later, layer = CASES[name]
    torch.manual_seed(0)
    student, teacher = build(8).eval(), build(12).eval()
    values = run(student, teacher, first, later, first, layer=layer)
    [alone] = run(student, teacher, later, layer=layer)
    assert values[1] == pytest.approx(alone, rel=1e-5)
    assert values[0] == pytest.approx(values[2], rel=1e-5)
    ignored = run(student, teacher, later, layer=layer, mask=None)
    assert values[1] != pytest.approx(ignored[0], rel=1e-4)


@pytest.mark.parametrize("first", [(WORDS,), (WORDS, None), (WORDS, torch.ones_like(WORDS))], ids=len)
def test_a_name_of_unknown_meaning(first: tuple[Any, ...]) -> None:
    with pytest.warns(UserWarning, match="The argument 'mask'.* may be the padding mask of"):
        run(Positions(8), Positions(12), first, (WORDS, VALID))


def test_a_name_of_unknown_meaning_inside() -> None:
    words = WORDS * VALID
    torch.manual_seed(0)
    student, teacher = Inside(8), Inside(12)
    with pytest.warns(UserWarning, match="The argument 'mask' .* may be the padding mask of its layers"):
        read = run(student, teacher, (words,), layer="block.mix")
    named = run(student, teacher, (words,), layer="block.mix", mask="mask")
    assert named != pytest.approx(read, rel=1e-3)
    assert read == run(student, teacher, (words,), layer="block.mix", mask=None)


@pytest.mark.parametrize("lengths", [VALID.sum(1), torch.full((SAMPLES,), LONGEST)])
def test_lengths(lengths: Tensor) -> None:
    with pytest.warns(
        UserWarning, match="The argument 'lengths' of the (student|teacher) may give the number of valid positions"
    ):
        run(Lengths(8), Lengths(12), (WORDS, lengths))
    run(Lengths(8), Lengths(12), (WORDS, lengths), mask=None)
    with pytest.raises(ValueError, match="it holds lengths and is no mask"):
        run(Lengths(8), Lengths(12), (WORDS, lengths), mask="lengths")


class Patches(nn.Module):
    """Patches of images, of which a mask may leave out some."""

    class Encoder(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.mix = nn.Linear(width, width)

        def forward(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
            return self.mix(x)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.layer = nn.Conv2d(3, width, 4, 4), self.Encoder(width)

    def forward(self, images: Tensor, seen: Tensor | None = None) -> Tensor:
        return self.layer(self.embed(images).flatten(2).mT, seen)


def test_patches_that_are_padding_later() -> None:
    images, seen = torch.randn(SAMPLES, 3, 16, 16), torch.ones(SAMPLES, 16, dtype=torch.bool)
    seen[1:, 8:] = False
    with pytest.warns(UserWarning, match="'attention_mask', which the first batch did not have, leaves out tokens"):
        run(Patches(8), Patches(12), (images,), (images, seen), layer="layer.mix")


def test_several_texts_in_a_sample_later() -> None:
    """Each token is seen: there is no padding, in the first batch or later."""
    values = run(Attention(8), Attention(12), (WORDS, PACKED | FULL), (WORDS, PACKED))
    assert len(values) == 2


@pytest.mark.parametrize("mask", [SEEN, SEEN[:, None]])
@pytest.mark.parametrize("first", [True, False])
def test_a_pairwise_mask_of_unknown_meaning(mask: Tensor, first: bool) -> None:
    batches = [(WORDS, mask)] if first else [(WORDS,), (WORDS, mask)]
    with pytest.warns(UserWarning, match="The argument 'mask'.* may be the padding mask of"):
        run(Positions(8), Positions(12), *batches)


@pytest.mark.parametrize("heads", [False, True])
def test_a_pairwise_mask_that_is_named(heads: bool) -> None:
    """True where a token is seen, or true where it is hidden: then what is hidden from all is padding."""
    torch.manual_seed(0)
    student, teacher = Positions(8), Positions(12)
    mask = SEEN[:, None] if heads else SEEN
    [expected] = run(student, teacher, (WORDS, VALID), mask="mask")
    assert run(student, teacher, (WORDS, mask), mask="mask") == [pytest.approx(expected, rel=1e-6)]
    assert run(student, teacher, (WORDS, ~mask), mask="~mask") == [pytest.approx(expected, rel=1e-6)]
    with pytest.warns(UserWarning, match="got None for it in the first batch"):
        late = run(student, teacher, (WORDS,), (WORDS, mask), mask="mask")
    assert late[1] == pytest.approx(expected, rel=1e-6)


def test_a_causal_mask_of_unknown_name_is_none_of_padding() -> None:
    run(Positions(8), Positions(12), (WORDS, CAUSAL.expand(SAMPLES, -1, -1)))


def test_a_name_of_unknown_meaning_inside_that_leaves_out_nothing_at_first() -> None:
    """Full batches need no warning; the first one with padding, or a later one, does."""
    networks = Inside(8), Inside(12)
    run(*networks, (WORDS,), (WORDS,), layer="block.mix")
    message = "The argument 'mask' of 'block', which left out no token in the first batch, leaves out some now"
    for full in (1, 2, 5):
        with pytest.warns(UserWarning, match=message):
            run(*networks, *[(WORDS,)] * full, *[(WORDS * VALID,)] * 4, layer="block.mix")
    run(*networks, (WORDS,), (WORDS * VALID,), layer="block.mix", mask=None)
    values = run(*networks, (WORDS,), (WORDS * VALID,), layer="block.mix", mask="mask")
    assert values[1] == run(*networks, (WORDS * VALID,), layer="block.mix", mask="mask")[0]


class TwoTowers(nn.Module):
    """Sound beside video, as many frames of each, and one mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hear, self.see = nn.Linear(5, width), nn.Linear(7, width)
        self.sound, self.video = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, sound: Tensor, video: Tensor, attention_mask: Tensor) -> Tensor:
        return self.sound(self.hear(sound)).sum(1) + self.video(self.see(video)).sum(1)


def test_a_doubtful_mask_that_leaves_out_nothing_at_first() -> None:
    signals = torch.randn(*WORDS.shape, 5), torch.randn(*WORDS.shape, 7)
    full, padded = (*signals, torch.ones_like(VALID)), (*signals, VALID)
    networks = TwoTowers(8), TwoTowers(12)
    run(*networks, full, full, layer="video")
    with pytest.warns(UserWarning, match="'attention_mask' of 'the network', which left out no token in the first"):
        run(*networks, full, padded, layer="video")


class Dropping(ByMapping):
    """In training it drops tokens at random, by a mask of such a name."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.mix = nn.Linear(width, width)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.mix(x * mask[..., None])

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.block = self.Block(width)

    def forward(self, words: Tensor) -> Tensor:  # type: ignore[override]
        kept = torch.rand(words.shape) > 0.3 if self.training else torch.ones(words.shape) > 0
        return self.block(self.embed(words), kept)


def test_a_mask_that_training_draws_is_none_of_padding() -> None:
    run(Dropping(8), Dropping(12), (WORDS,), (WORDS,), layer="block.mix")


def test_the_name_of_a_cache_does_not_depend_on_the_padding_of_the_first_batch(tmp_path: Path) -> None:
    """A doubtful mask that leaves out nothing is watched, and read by nothing that is kept."""
    signals, teacher = (torch.randn(*WORDS.shape, 5), torch.randn(*WORDS.shape, 7)), TwoTowers(12)
    for mask in (VALID, torch.ones_like(VALID)):
        student, transfer = TwoTowers(8), RepresentationTransfer(teacher, ["video"], teacher_cache=tmp_path)
        with warnings.catch_warnings(), transfer.attached(student):
            warnings.filterwarnings("ignore", ".*attention_mask")
            student(*signals, mask)
            transfer.loss().backward()
    assert len(list(tmp_path.iterdir())) == 1
