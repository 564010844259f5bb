"""Masks that code makes for the modules inside: named by the user, or found and read as values show."""

from __future__ import annotations

import re
import warnings
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


class Inner(nn.Module):
    """A block that gets a mask. It does nothing with it, since what is tested is what a layer reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, width)

    def forward(self, x: Tensor, attention_mask: Any = None, padding_mask: Any = None) -> Tensor:
        return self.linear(x).tanh()


class Making(nn.Module):
    """Makes the mask of its block from the sizes of the samples, as the pixel decoder of Mask2Former does.

    Args:
        width: Number of neurons.
        name: Argument of the block.
        true_at: What the true elements of the mask are, whatever its name says.
        dtype: Its type.
        is_pairwise: Whether it is of shape ``(B, 1, T, T)``.
    """

    def __init__(
        self, width: int, name: str, true_at: str, dtype: torch.dtype = torch.bool, is_pairwise: bool = False
    ) -> None:
        super().__init__()
        self.block, self.head = Inner(width), nn.Linear(width, 2)
        self.name, self.true_at, self.dtype, self.is_pairwise = name, true_at, dtype, is_pairwise

    def forward(self, x: Tensor, ends: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            return self.head(self.block(x, attention_mask=attention_mask.bool()).mean(1))
        mask = torch.arange(x.shape[1]) < ends[:, :1].long()
        mask = (mask if self.true_at == "valid" else ~mask).to(self.dtype)
        if self.is_pairwise:
            mask = mask[:, None, None].expand(-1, 1, x.shape[1], -1)
        return self.head(self.block(x, **{self.name: mask}).mean(1))


#: Masks that mean the opposite of their names.
TURNED: dict[str, dict[str, Any]] = {
    "booleans": {"name": "attention_mask", "true_at": "padding"},
    "whole numbers": {"name": "attention_mask", "true_at": "padding", "dtype": torch.long},
    "which token sees which": {"name": "attention_mask", "true_at": "padding", "is_pairwise": True},
    "named after padding": {"name": "padding_mask", "true_at": "valid"},
}
FULL, ENDS = (torch.tensor([sizes], dtype=torch.float32).T.expand(-1, 2) for sizes in ([7] * 4, [7, 4, 5, 7]))


class Run:
    """A transfer between two such networks, with what it told."""

    def __init__(self, *, mask: Any = "auto", **options: Any) -> None:
        torch.manual_seed(0)
        self.student, teacher = Making(6, **options), Making(10, **options)
        pair = LayerPair("block", "block", mask=mask)
        self.transfer = RepresentationTransfer(teacher, [pair], weight=1.0, plan="uniform", memory=0.0)
        self.table: list[str] = []
        self.transfer.report = self.table.append

    def terms(self, *ends: Tensor, filling: float = 0.0) -> tuple[list[float], list[str]]:
        """The terms of batches with these sizes, and the warnings."""
        found = []
        with warnings.catch_warnings(record=True) as noted, self.transfer.attached(self.student):
            warnings.simplefilter("always")
            for number, each in enumerate(ends):
                x = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(number))
                self.student(x.masked_fill((torch.arange(7) >= each[:, :1])[..., None], filling), each)
                found.append(self.transfer.loss().item())
        return found, [str(each.message) for each in noted]


@pytest.mark.parametrize("kind", TURNED)
def test_a_mask_that_leaves_nothing_by_its_name_means_the_opposite(kind: str) -> None:
    run = Run(**TURNED[kind])
    terms, told = run.terms(FULL, ENDS)
    assert told == []
    assert terms[0] == pytest.approx(Run(**TURNED[kind], mask=None).terms(FULL)[0][0], rel=1e-4)
    # A later batch has padding, which is left out.
    other = Run(**TURNED[kind]).terms(FULL, ENDS, filling=5.0)[0]
    assert other == pytest.approx(terms, rel=1e-4)
    place = "valid tokens" if kind == "named after padding" else "padding"
    assert f"{TURNED[kind]['name']} (true at {place})" in "".join(run.table)


@pytest.mark.parametrize(("name", "true_at"), [("attention_mask", "valid"), ("padding_mask", "padding")])
def test_a_mask_that_marks_all_tokens_by_its_name_is_read_by_it(name: str, true_at: str) -> None:
    run, other = (Run(name=name, true_at=true_at) for _ in range(2))
    terms, told = run.terms(FULL, ENDS)
    assert told == []
    assert other.terms(FULL, ENDS, filling=5.0)[0] == pytest.approx(terms, rel=1e-4)
    assert "(true at" not in "".join(run.table)


def test_a_mask_that_leaves_one_token_is_read_by_its_name() -> None:
    """What it says of the other samples is to be used in any case."""
    ends = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).T.expand(-1, 2)
    _, told = Run(name="attention_mask", true_at="valid").terms(ends)
    assert all("leaves no token in 3 samples, if true means valid" in one for one in told)
    assert len(told) == 2


def test_an_empty_mask_of_the_user_is_read_by_its_name() -> None:
    """Also in the module inside, which gets it as booleans."""
    run = Run(name="attention_mask", true_at="valid")
    with warnings.catch_warnings(record=True) as noted, run.transfer.attached(run.student):
        warnings.simplefilter("always")
        run.student(torch.randn(4, 7, 3), attention_mask=torch.zeros(4, 7, dtype=torch.long))
        run.transfer.loss()
    assert "leaves no token in 4 samples" in str(noted[0].message)
    assert "(true at" not in "".join(run.table)


def test_what_the_warning_of_an_empty_sample_says_works() -> None:
    """The mask of an inner module may be named, though the network has none of that name, or did not get it."""
    options = {"name": "attention_mask", "true_at": "padding"}
    ends = torch.tensor([[0.0, 4.0, 5.0, 7.0]]).T.expand(-1, 2)
    told = Run(**options).terms(ends.flip(0))[1]
    assert "leaves no token in 1 samples, if true means valid" in told[0]
    (name,) = re.findall(r'LayerPair\(mask="(.*?)"\)', told[0])
    terms, told = Run(**options, mask=name).terms(ENDS, ENDS)
    assert told == []
    assert Run(**options, mask=name).terms(ENDS, ENDS, filling=5.0)[0] == pytest.approx(terms, rel=1e-4)


def test_what_the_error_of_whole_numbers_says_works() -> None:
    options = {"name": "padding_mask", "true_at": "valid", "dtype": torch.long}
    with pytest.raises(ValueError, match=r"'padding_mask' of 'block' marks valid") as caught:
        Run(**options).terms(ENDS)
    name = re.findall(r'mask="(.*?)"', str(caught.value))[0]
    terms, told = Run(**options, mask=name).terms(ENDS)
    assert told == []
    assert Run(**options, mask=name).terms(ENDS, filling=5.0)[0] == pytest.approx(terms, rel=1e-4)


def test_the_error_of_a_wrong_name_lists_the_masks_of_modules_inside() -> None:
    with pytest.raises(ValueError, match=r"the modules around 'block' get \['attention_mask'\]"):
        Run(name="attention_mask", true_at="padding", mask="~mask").terms(ENDS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_pixel_decoder_of_mask2former() -> None:
    """Its mask is true at padding, and it never has any."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=4, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    student, teacher = (transformers.Mask2FormerForUniversalSegmentation(config) for _ in range(2))
    name = "model.pixel_level_module.decoder.encoder.layers.0"
    transfer = RepresentationTransfer(teacher, [name])
    table: list[str] = []
    transfer.report = table.append
    with warnings.catch_warnings(record=True) as noted, transfer.attached(student):
        warnings.simplefilter("always")
        student(torch.randn(2, 3, 32, 32))
        transfer.loss()
    assert [one for one in noted if "mask" in str(one.message) or "constant" in str(one.message)] == []
    assert transfer.transport_value.item() > 0.1
    assert "attention_mask (true at padding)" in "".join(table)
