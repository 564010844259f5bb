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


def test_a_named_mask_that_the_network_does_not_get_is_told() -> None:
    student, teacher = (nn.TransformerEncoderLayer(6, 1, width, 0.0, batch_first=True) for width in (8, 12))
    pair = LayerPair("linear1", "linear1", mask="~src_key_padding_mask")
    transfer = RepresentationTransfer(teacher, [pair], plan="uniform", memory=0.0)
    x = torch.randn(4, 7, 6)
    with transfer.attached(student):
        with pytest.warns(UserWarning, match="names the mask of .* got None for it in the first batch") as found:
            student(x)
        transfer.loss()
        assert [str(one.message).split(" layers")[0].split()[-1] for one in found] == ["student", "teacher"]
        # Later batches may have one.
        student(x.masked_fill(~VALID[..., None], 7.0), src_key_padding_mask=~VALID)
        first = transfer.loss().item()
        student(x.masked_fill(~VALID[..., None], -7.0), src_key_padding_mask=~VALID)
        assert transfer.loss().item() == pytest.approx(first, rel=1e-4)
