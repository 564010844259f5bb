"""Positional arguments reach the argument of the same name of a teacher, and masks of other shapes are seen."""

from __future__ import annotations

import pytest
import torch
from forwards.masked import SAMPLES, VALID, WORDS
from forwards.masked_terms import run
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer


class Words(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.kind, self.mix = nn.Embedding(50, width), nn.Embedding(2, width), nn.Linear(width, width)

    def read(self, words: Tensor, kinds: Tensor | None) -> Tensor:
        return self.mix(self.embed(words) + (0.0 if kinds is None else self.kind(kinds)))


class Kinds(Words):
    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.read(input_ids, token_type_ids)


class Other(Words):
    def forward(self, input_ids: Tensor, token_type_ids: Tensor, unknown: Tensor | None = None) -> Tensor:
        return self.read(input_ids, token_type_ids)


class Full(Words):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        return self.read(input_ids, token_type_ids)


def test_by_position_as_by_name() -> None:
    student, teacher = Kinds(8), Full(12)
    kinds = VALID.long()
    values = []
    for args, kwargs in (((WORDS, kinds), {}), ((WORDS,), {"token_type_ids": kinds})):
        transfer = RepresentationTransfer(teacher, {"mix": "mix"}, plan="uniform", weight=1.0)
        with transfer.attached(student):
            for _ in range(2):
                student(*args, **kwargs)
                values.append(float(transfer.loss().detach()))
    assert values == pytest.approx([values[0]] * 4)


def test_an_argument_that_the_teacher_does_not_have() -> None:
    student, transfer = Other(8), RepresentationTransfer(Full(12), {"mix": "mix"}, plan="uniform")
    with transfer.attached(student), pytest.raises(ValueError, match="teacher has no argument .*`teacher_inputs`"):
        student(WORDS, VALID.long(), VALID)


class Column(Words):
    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        return self.read(words, None)


class NodeColumn(Words):
    def forward(self, words: Tensor, node_mask: Tensor) -> Tensor:
        return self.read(words, None)


class PatchValid(Words):
    def forward(self, words: Tensor, patch_valid: Tensor) -> Tensor:
        return self.read(words, None)


def test_a_mask_with_an_axis_of_one_behind() -> None:
    student, teacher = Column(8), Column(12)
    rows = run(student, teacher, (WORDS, VALID))
    assert run(student, teacher, (WORDS, VALID[..., None])) == pytest.approx(rows)
    assert run(student, teacher, (WORDS, VALID[..., None].float())) == pytest.approx(rows)


@pytest.mark.parametrize(("build", "name"), [(NodeColumn, "node_mask"), (PatchValid, "patch_valid")])
def test_other_names(build: type[nn.Module], name: str) -> None:
    for mask in (VALID, VALID[..., None].float()):
        with pytest.warns(UserWarning, match=f"The argument '{name}' of the (student|teacher) may be the padding mask"):
            run(build(8), build(12), (WORDS, mask))
        run(build(8), build(12), (WORDS, mask), mask=name)


class Flat(nn.Module):
    """Logits of the tokens of all samples along one axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head = Column(width), nn.Linear(width, 3)

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.body(words, attention_mask).flatten(0, 1))


def test_flat_tokens() -> None:
    assert len(VALID) == SAMPLES
    match = "The tokens of all samples lie along one axis in the (student|teacher) layers"
    with pytest.warns(UserWarning, match=match):
        run(Flat(8), Flat(12), (WORDS, VALID), layer="head:input")
    run(Flat(8), Flat(12), (WORDS, VALID), layer="head:input", mask=None)
    run(Flat(8), Flat(12), (WORDS, torch.ones_like(VALID)), layer="head:input")
    student, transfer = Flat(8), RepresentationTransfer(Flat(12), {"body.mix": "body.mix"}, distillation=1.0)
    with transfer.attached(student):
        with pytest.warns(UserWarning, match=match):
            student(WORDS, VALID)
        transfer.loss()
