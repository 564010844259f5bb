"""Masks that code makes for the modules inside, named by the user, where the network has such an argument, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer

VALID = torch.arange(7) < torch.tensor([[7], [4], [5], [7]])


class Block(nn.Module):
    """One head of attention, with a mask (B, 1, T, T) that is true where a token may look."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.key_value, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        key, value = self.key_value(x).chunk(2, -1)
        return x + self.out(
            nn.functional.scaled_dot_product_attention(x[:, None], key[:, None], value[:, None], attn_mask)[:, 0]
        )


class Flexible(nn.Module):
    """As NaFlexViT of timm: it takes a dict with flags, and an argument of the name that its blocks get."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(Block(width) for _ in "ab")

    def forward(self, batch: dict[str, Tensor], attn_mask: Tensor | None = None) -> Tensor:
        x, keep = self.embed(batch["patches"]), batch["keep"]
        if attn_mask is None:
            attn_mask = keep[:, None, None, :].expand(-1, 1, keep.shape[1], -1)
        for block in self.blocks:
            x = block(x, attn_mask)
        return self.head((x * keep[..., None]).sum(1))


def _term(filling: float, **options: Any) -> float:
    torch.manual_seed(0)
    student, teacher = Flexible(6), Flexible(10)
    patches = torch.randn(4, 7, 3).masked_fill(~VALID[..., None], filling)
    transfer = RepresentationTransfer(
        teacher, [LayerPair("blocks.1", "blocks.1", **options)], weight=1.0, plan="uniform"
    )
    with transfer.attached(student):
        student({"patches": patches, "keep": VALID})
        return transfer.loss().item()


def test_a_name_that_is_not_given_is_that_of_the_modules_inside() -> None:
    assert _term(0.0, mask="attn_mask") == pytest.approx(_term(5.0, mask="attn_mask"), rel=1e-5)
    assert _term(0.0, mask="attn_mask") == pytest.approx(_term(0.0, mask="keep"), rel=1e-5)


def test_without_it_padding_is_read_and_told() -> None:
    with pytest.warns(UserWarning, match=r"LayerPair\(mask="):
        _term(0.0)
    assert _term(0.0, mask=None) != pytest.approx(_term(5.0, mask=None), rel=1e-4)
