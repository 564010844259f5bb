"""Padding is left out by the mask of the layer's own sequence: the term against one that is computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forwards.masked import (
    LENGTHS,
    LONGEST,
    SAMPLES,
    SITUATIONS,
    VALID,
    WORDS,
    Named,
    Scores,
    Situation,
    hugging_face,
)
from forwards.masked_terms import check_term, run
from helpers import with_slow
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer


@pytest.mark.parametrize("name", with_slow(SITUATIONS, "T5"))
def test_value(name: str) -> None:
    check_term(SITUATIONS[name])


def _longformer(width: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return {**sizes, "vocab_size": 50, "attention_window": 4, "max_position_embeddings": 64, "pad_token_id": 1}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("looked_at", [0, 1, 4])
@pytest.mark.parametrize("name", with_slow(["LongformerModel", "LongformerForTokenClassification"], "LongformerFor"))
def test_tokens_that_all_others_look_at(name: str, looked_at: int, padded: bool) -> None:
    """Longformer's layers get numbers below 0 at padding, above 0 at such tokens, and 0 at all others."""
    layer = "encoder.layer.1.output" if name == "LongformerModel" else "longformer.encoder.layer.1.output"
    words, valid = WORDS[:, :8], VALID[:, :8] if padded else torch.ones(SAMPLES, 8, dtype=torch.bool)
    everywhere = torch.zeros_like(words)
    everywhere[:, :looked_at] = 1
    masks = {"attention_mask": valid.long(), "global_attention_mask": everywhere}
    build = hugging_face(name, "LongformerConfig", _longformer)
    check_term(Situation(build, (words,), layer, valid, kwargs=masks))


class Optional(Scores):
    def forward(self, words: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(words, torch.ones_like(words) if attention_mask is None else attention_mask)


def test_a_mask_that_the_first_batch_does_not_have() -> None:
    student, teacher = Optional(8), Optional(12)
    other = torch.where(VALID, WORDS, (WORDS + 7) % 50)
    values = run(student, teacher, (WORDS,), (WORDS, VALID.long()), (other, VALID.long()), (WORDS,))
    assert values[1] == pytest.approx(values[2], rel=1e-5)
    assert values[0] == pytest.approx(values[3], rel=1e-5)
    assert values[0] != pytest.approx(values[1], rel=1e-3)


def test_batches_of_other_lengths() -> None:
    batches = [(WORDS[:, :length], VALID.long()[:, :length]) for length in (9, 7, 4)]
    assert len(set(run(Scores(8), Scores(12), *batches))) == 3


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layer", ["encoder", "encoder.layers.0", "encoder.layers.1:input"])
def test_nested_tensors_of_the_fast_path(layer: str) -> None:
    """The teacher in evaluation mode makes nested tensors, the student in training does not."""

    class Encoder(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, width)
            inner = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(inner, 2)

        def forward(self, words: Tensor, src_key_padding_mask: Tensor) -> Tensor:
            return self.encoder(self.embed(words), src_key_padding_mask=src_key_padding_mask)

    torch.manual_seed(0)
    student, teacher = Encoder(8), Encoder(12)
    # No sample is as long as the batch, so that a nested tensor is shorter than the mask.
    padding = ~VALID | (torch.arange(LONGEST) == LONGEST - 1)
    found = run(student, teacher, (WORDS, padding), layer=layer)
    for net in (student, teacher):
        net.encoder.use_nested_tensor = False
    slow = RepresentationTransfer(teacher, [(layer, layer)], weight=1.0, plan="uniform")
    with slow.attached(student):
        student(WORDS, padding)
        assert found[0] == pytest.approx(float(slow.loss().detach()), rel=1e-5)


class Features(Named):
    """A method is called in place of the forward."""

    def features(self, attention_mask: Tensor, words: Tensor) -> Tensor:
        return self.mix(self.embed(words))

    def forward(self, attention_mask: Tensor, words: Tensor) -> Tensor:
        return self.features(attention_mask, words)


def test_a_method_as_root() -> None:
    student, teacher = Features(8), Features(12)
    expected = run(student, teacher, (VALID, WORDS))
    transfer = RepresentationTransfer(
        teacher, [LayerPair("mix", "mix")], weight=1.0, plan="uniform", student_root=":features"
    )
    with transfer.attached(student):
        for _ in range(2):
            student.features(VALID, WORDS)
            assert float(transfer.loss().detach()) == pytest.approx(expected[0], rel=1e-6)


def test_integers_named_after_padding() -> None:
    student, teacher = _Padding(8), _Padding(12)
    for mask in ((~VALID).long(), (~VALID).float()):
        with pytest.raises(ValueError, match=r"It is not known whether the mask 'padding_mask' .* numbers.*LayerPair"):
            run(student, teacher, (WORDS, mask))
        assert run(student, teacher, (WORDS, mask), mask="~padding_mask") == run(student, teacher, (WORDS, ~VALID))


class _Padding(Named):
    def forward(self, words: Tensor, padding_mask: Tensor) -> Tensor:
        return self.mix(self.embed(words))


def test_a_name_that_is_no_argument() -> None:
    with pytest.raises(ValueError, match=r"mask='mask' names no argument of the student \(Scores\).*'attention_mask'"):
        run(Scores(8), Scores(12), (WORDS, VALID.long()), mask="mask")


def test_a_named_mask_of_another_length() -> None:
    with pytest.raises(
        ValueError, match=r"The mask 'ignored' has the shape \(6, 4\), but the student layer 'mix' has 9"
    ):
        run(_Loose(8), _Loose(12), (WORDS, VALID[:, :4]), mask="~ignored")


class _Loose(Named):
    def forward(self, words: Tensor, ignored: Tensor) -> Tensor:
        return self.mix(self.embed(words))


def test_one_side_without_a_mask() -> None:
    class Plain(Scores):
        def forward(self, words: Tensor, other: Tensor) -> Tensor:
            return super().forward(words, other)

    with pytest.warns(UserWarning, match=r"one side only: no mask was found for the teacher layers \['mix'\]"):
        run(Scores(8), Plain(12), (WORDS, VALID.long()))
    run(Scores(8), Plain(12), (WORDS, VALID.long()), mask=("auto", None))
    run(Scores(8), Plain(12), (WORDS, VALID.long()), mask=("attention_mask", "other"))


def test_a_mask_the_wrong_way_round() -> None:
    with pytest.warns(UserWarning, match=r"leaves no token in 1 samples.*LayerPair\(mask=\"~attention_mask\"\)"):
        run(_Ignores(8), _Ignores(12), (WORDS, ~VALID))


class _Ignores(Named):
    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        return self.mix(self.embed(words))


def test_a_name_that_may_mean_either() -> None:
    with pytest.warns(UserWarning, match=r"The argument 'mask' of the (student|teacher) may be the padding mask"):
        either = run(_Mask(8), _Mask(12), (WORDS, VALID))
    student, teacher = _Mask(8), _Mask(12)
    named = run(student, teacher, (WORDS, VALID), mask="mask")
    assert named == run(student, teacher, (WORDS, ~VALID), mask="~mask")
    assert named != either


class _Mask(Named):
    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        return self.mix(self.embed(words))


def test_table() -> None:
    transfer = RepresentationTransfer(Scores(12), [LayerPair("mix", "mix", mask=("auto", None))], plan="uniform")
    reports: list[str] = []
    transfer.report = reports.append
    student = Scores(8)
    with transfer.attached(student):
        student(WORDS, VALID.long())
        transfer.loss()
    heading, row = reports[0].splitlines()[-2:]
    assert heading.endswith("  mask")
    assert row.endswith("  attention_mask / none")


def test_state_keeps_the_mask() -> None:
    student, teacher = Named(8), Named(12)
    batch = WORDS, (~VALID).long()

    def make() -> RepresentationTransfer:
        return RepresentationTransfer(teacher, [LayerPair("mix", "mix", mask="~ignored")], weight=1.0, plan="uniform")

    first = make()
    with first.attached(student):
        student(*batch)
        value = float(first.loss().detach())
    second = make()
    second.load_state_dict(first.state_dict())
    with second.attached(student):
        student(*batch)
        assert float(second.loss().detach()) == pytest.approx(value)
    assert second.pairs[0].mask == "~ignored"


def test_lengths_differ() -> None:
    """The batch of these tests has short and long samples."""
    assert VALID.shape == (SAMPLES, LONGEST)
    assert len(LENGTHS.unique()) == SAMPLES
