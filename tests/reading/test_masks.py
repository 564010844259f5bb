"""Which inputs are padding masks, and which value of theirs is padding."""

from __future__ import annotations

import pytest
import torch

from lightning_otrt.reading.masks import padding_mask

VALID = torch.tensor([[1, 1, 0], [1, 0, 0]])
PADDING = VALID == 0


@pytest.mark.parametrize(
    ("args", "kwargs", "found"),
    [
        ((), {"attention_mask": VALID}, True),
        ((), {"padding_mask": VALID.bool()}, True),
        ((), {"attention_mask": VALID * 0.5}, True),
        ((), {"src_key_padding_mask": PADDING}, True),
        ((), {"key_padding_mask": PADDING}, True),
        (({"attention_mask": VALID},), {}, True),
        (({"input_ids": VALID},), {"attention_mask": VALID}, True),
        (({"attention_mask": PADDING},), {"attention_mask": VALID}, True),
        ((), {"attention_mask": VALID, "key_padding_mask": VALID.bool()}, True),
        ((), {"attention_mask": VALID[None]}, False),
        ((), {"attention_mask": VALID[0]}, False),
        ((), {"attention_mask": VALID.tolist()}, False),
        ((), {"key_padding_mask": PADDING[0]}, False),
        ((), {"key_padding_mask": PADDING.float()}, False),
        ((), {"key_padding_mask": None}, False),
        ((VALID,), {}, False),
        ((), {}, False),
    ],
)
def test_padding_masks(args, kwargs, found) -> None:
    mask = padding_mask(args, kwargs)
    if found:
        assert mask is not None
        assert mask.dtype == torch.bool
        assert mask.tolist() == VALID.bool().tolist()
    else:
        assert mask is None
