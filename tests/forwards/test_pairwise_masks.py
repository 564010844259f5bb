"""Masks that say which token sees which: true at what is hidden, added to scores, and those of flat layers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer

LENGTHS = torch.tensor([3, 6, 4, 5, 2, 6])
VALID = torch.arange(6) < LENGTHS[:, None]
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()
IDS = torch.randint(1, 30, VALID.shape, generator=torch.Generator().manual_seed(0)) * VALID


class Block(nn.Module):
    """Attention whose mask is true at what is hidden, as in Megatron, or is added to the scores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        scores, mask = query @ key.mT, attention_mask[:, 0]
        scores = scores.masked_fill(mask, -1e4) if mask.dtype == torch.bool else scores + mask
        return x + self.out(scores.softmax(-1) @ value)


class Decoder(nn.Module):
    """It makes its masks itself, or gets them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, width), nn.Linear(width, 30)
        self.layers = nn.ModuleList(Block(width) for _ in "ab")

    def forward(self, ids: Tensor, scores: Tensor | None = None) -> Tensor:
        hidden = (~CAUSAL | (ids == 0)[:, None, :])[:, None] if scores is None else scores
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, attention_mask=hidden)
        return self.head(x)


def _term(*batch: Tensor, mask: str | None = "auto") -> float:
    torch.manual_seed(1)
    student, teacher = Decoder(8), Decoder(6)
    transfer = RepresentationTransfer(teacher, [LayerPair("layers.1", "layers.1", mask=mask)], plan="uniform")
    with transfer.attached(student):
        student(*batch)
        return transfer.loss().item()


def test_one_that_is_true_at_later_tokens_hides_them_whatever_its_name() -> None:
    """By its name, every token would see later ones and none would see itself."""
    full = IDS.clamp_min(1)
    assert _term(full) == _term(full, mask=None)


def test_what_it_hides_from_all_tokens_is_padding() -> None:
    scores = torch.zeros(6, 1, 6, 6).masked_fill(~(CAUSAL & VALID[:, None, :])[:, None], -1e4)
    named = _term(IDS, scores, mask="scores")
    assert _term(IDS) == pytest.approx(named, rel=1e-5)
    assert named != pytest.approx(_term(IDS, mask=None), rel=1e-3)


def test_one_that_is_added_to_scores_is_read_alike_under_both_meanings() -> None:
    scores = torch.zeros(6, 1, 6, 6).masked_fill(~(CAUSAL & VALID[:, None, :])[:, None], -1e9)
    assert _term(IDS, scores, mask="~scores") == _term(IDS, scores, mask="scores")


class Sees(nn.Module):
    """Its mask is true at what a token sees; it makes the mask itself."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.mix = nn.Linear(width, width)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            scores = (x @ x.mT).masked_fill(~attention_mask[:, 0], -1e4)
            return x + scores.softmax(-1) @ self.mix(x)

    def __init__(self, width: int, seen: Tensor) -> None:
        super().__init__()
        self.seen, self.embed, self.head = seen, nn.Embedding(30, width), nn.Linear(width, 3)
        self.layers = nn.ModuleList(self.Block(width) for _ in "ab")

    def forward(self, ids: Tensor) -> Tensor:
        x, mask = self.embed(ids), self.seen & (ids != 0)[:, None, None]
        for layer in self.layers:
            x = layer(x, attention_mask=mask)
        return self.head(x.mean(1))


@pytest.mark.parametrize(
    "seen",
    [torch.ones(6, 6).index_fill(1, torch.tensor(0), 0).bool(), ~torch.eye(6, dtype=torch.bool)],
    ids=["no first token", "not itself"],
)
@pytest.mark.parametrize("ids", [IDS, IDS.clamp_min(1)], ids=["padded", "full"])
def test_masks_that_are_no_triangle_are_read_by_their_name(seen: Tensor, ids: Tensor) -> None:
    values = []
    for mask in ("auto", "attention_mask", None):
        torch.manual_seed(1)
        student, teacher = Sees(8, seen), Sees(6, seen)
        transfer = RepresentationTransfer(teacher, [LayerPair("layers.1", "layers.1", mask=mask)], plan="uniform")
        with transfer.attached(student), warnings.catch_warnings():
            # A full batch has one mask for all samples, which counts as none.
            warnings.filterwarnings("ignore", "LayerPair.mask='attention_mask'. names the mask")
            student(ids)
            student(IDS)
            values.append(transfer.loss().item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0] != pytest.approx(values[2], rel=1e-4)


class Flat(nn.Module):
    """A layer in it gets the tokens of all samples along one axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(30, width), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.mix(self.embed(ids).flatten(0, 1)).unflatten(0, ids.shape)
        return self.head((x * attention_mask[..., None]).sum(1))


def test_a_mask_that_is_named_for_a_flat_layer_is_refused() -> None:
    transfer = RepresentationTransfer(Flat(6), [LayerPair("mix", "mix", mask="attention_mask")])
    student = Flat(8)
    message = r"student layer 'mix' of shape \(36, 8\): the tokens of all samples lie along one axis"
    with pytest.raises(ValueError, match=message), transfer.attached(student):
        student(IDS, VALID)
