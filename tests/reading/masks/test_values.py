"""What the elements of a mask mean, and which tokens of a layer it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import MaskSource
from lightning_otrt.reading.masks.values import (
    as_rows,
    count_frames,
    fit_mask,
    problem_of,
    valid_tokens,
)

VALID = torch.tensor([[1, 1, 0], [1, 0, 0]])
PADDING = VALID == 0
ADDED = torch.where(PADDING, -torch.inf, 0.0)


def source(true_at: str, is_named: bool = False) -> MaskSource:
    return MaskSource("", "mask", true_at, is_named=is_named)


@pytest.mark.parametrize(
    ("mask", "where"),
    [
        (VALID, source("valid")),
        (VALID.bool(), source("valid")),
        (VALID * 0.5, source("valid")),
        (ADDED, source("valid")),
        (ADDED.clamp_min(-1e4).half(), source("valid")),
        ((VALID - 1) * 10000, source("valid")),
        # Longformer: tokens that all others look at have more than 0.
        (torch.where(PADDING, -1e4, torch.tensor([1e4, 0.0, 0.0])), source("valid")),
        (PADDING, source("padding")),
        (ADDED, source("padding")),
        (PADDING.long(), source("padding", is_named=True)),
        (VALID, source("valid", is_named=True)),
    ],
)
def test_valid_tokens(mask: Tensor, where: MaskSource) -> None:
    assert problem_of(mask, where) == ""
    assert valid_tokens(mask, where).tolist() == VALID.bool().tolist()


@pytest.mark.parametrize("mask", [torch.zeros(2, 3), torch.zeros(2, 3).bool()])
def test_no_padding(mask: Tensor) -> None:
    assert valid_tokens(mask, source("padding")).all()
    assert valid_tokens(torch.zeros(2, 3), source("valid")).all()  # added to scores: a mask of ones has a positive one


def test_no_padding_and_tokens_that_all_others_look_at() -> None:
    assert valid_tokens(torch.tensor([[torch.finfo(torch.float32).max, 0.0, 0.0]]), source("valid")).all()
    assert valid_tokens(torch.tensor([[200, 0, 0]]), source("valid")).sum() == 1  # numbers of packed samples


@pytest.mark.parametrize("mask", [PADDING.float(), PADDING.long(), PADDING.byte()])
def test_unknown_polarity(mask: Tensor) -> None:
    assert "numbers" in problem_of(mask, source("padding"))


def test_integers_that_come_later() -> None:
    with pytest.raises(ValueError, match=r"'mask' of 'the network' .* padding: .* int64 .*mask=\"~mask\""):
        valid_tokens(PADDING.long(), source("padding"))


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (VALID, (2, 3)),
        (VALID[:, None], (2, 3)),
        (VALID[:, None, None], (2, 3)),
        (VALID[:, None].expand(2, 3, 3), None),
        (VALID[0], None),
        (VALID.tolist(), None),
        (None, None),
    ],
)
def test_rows(value: object, shape: tuple[int, int] | None) -> None:
    rows = as_rows(value)
    assert (None if rows is None else tuple(rows.shape)) == shape


class Speech(nn.Module):
    def _get_feat_extract_output_lengths(self, samples: Tensor) -> Tensor:
        return (samples - 2) // 3 + 1


def test_masks_that_fit() -> None:
    mask = torch.arange(11) < torch.tensor([[11], [5]])
    plain, speech = nn.Identity(), Speech()
    assert fit_mask(mask, 2, 11, 0, plain) is mask
    assert fit_mask(mask, 2, 12, 1, plain) is mask
    assert fit_mask(mask.T, 2, 11, 0, plain).equal(mask)
    assert fit_mask(mask, 2, 4, 0, plain) is None
    assert fit_mask(mask, 2, 4, 0, speech).tolist() == [[True] * 4, [True, True, False, False]]
    assert fit_mask(mask, 2, 5, 0, speech) is None
    assert (count_frames(speech, 11), count_frames(plain, 11)) == (4, None)
