"""Distilled logits of positions: whose padding is left out, and which axis is that of the classes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer

WORDS = seeded(0, torch.randint, 3, 50, (6, 9))
VALID = torch.arange(9) < torch.tensor([[3], [9], [5], [4], [7], [6]])
IMAGES = seeded(1, torch.randn, 4, 3, 16, 16)


class Tagger(nn.Module):
    """Logits of each token, with a mask whose name does not tell what it marks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(50, width), nn.Linear(width, width), nn.Linear(width, 7)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)).relu())


def _terms(filler: int, **options: object) -> tuple[float, list[str]]:
    transfer = RepresentationTransfer(seeded(3, Tagger, 12), [LayerPair("body", "body", **options)], distillation=1.0)
    with warnings.catch_warnings(record=True) as caught, transfer.attached(seeded(2, Tagger, 8)) as attached:
        warnings.simplefilter("always")
        attached.student(WORDS.where(VALID, filler), VALID)
        transfer.loss()
    assert transfer.distillation_value is not None
    return float(transfer.distillation_value), [str(warning.message) for warning in caught]


def test_a_mask_that_a_pair_names_is_that_of_the_logits_too() -> None:
    first, second = (_terms(filler, mask="mask") for filler in (1, 2))
    assert first == (pytest.approx(second[0], rel=1e-6), [])
    padding_is_read, messages = _terms(1)
    assert padding_is_read != pytest.approx(first[0], rel=1e-3)
    of_logits = [message for message in messages if "its layers ['logits']" in message]
    assert len(of_logits) == 2
    assert all("The argument 'mask' of the" in message for message in of_logits)
    assert _terms(1, mask=None) == (pytest.approx(padding_is_read), [])


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM", "GPT2LMHeadModel"])
def test_padding_of_language_models(name: str) -> None:
    """Their last layer may be called decoder, and is none."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    sizes = {"vocab_size": 50, "max_position_embeddings": 20, "n_positions": 20}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    small |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    values = []
    for filler in (3, 4):
        student, teacher = (seeded(number, kind, kind.config_class(**sizes, **small)).eval() for number in (2, 3))
        transfer = RepresentationTransfer(teacher, weight=0.0, distillation=1.0)
        with transfer.attached(student):
            student(input_ids=WORDS.where(VALID, filler), attention_mask=VALID.long())
            transfer.loss()
        assert transfer.distillation_value is not None
        values.append(float(transfer.distillation_value))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


class Segmenter(nn.Module):
    """Logits (B, K, H, W), or with the classes last."""

    def __init__(self, width: int, *, classes_last: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, 5, 1)
        self.classes_last = classes_last

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.body(x).relu())
        return logits.permute(0, 2, 3, 1) if self.classes_last else logits


@pytest.mark.parametrize("student_last", [False, True])
@pytest.mark.parametrize("teacher_last", [False, True])
def test_classes_along_the_last_axis(student_last: bool, teacher_last: bool) -> None:
    student, teacher = seeded(2, Segmenter, 8, classes_last=False), seeded(3, Segmenter, 12, classes_last=False)
    expected = _distillation(student, teacher)
    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    student.classes_last, teacher.classes_last = student_last, teacher_last
    assert _distillation(student, teacher) == pytest.approx(expected, rel=1e-5)


def _distillation(student: nn.Module, teacher: nn.Module) -> float:
    transfer = RepresentationTransfer(teacher, ["body"], distillation=1.0)
    with transfer.attached(student):
        student(IMAGES)
        transfer.loss()
    assert transfer.distillation_value is not None
    return float(transfer.distillation_value)
