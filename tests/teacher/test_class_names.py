"""Distillation between networks that name their classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_otrt import LogitDistillation, RepresentationTransfer
from lightning_otrt.teacher.class_names import class_names

MNLI = ("contradiction", "neutral", "entailment")
OTHER_ORDER = ("entailment", "neutral", "contradiction")
FEELINGS = ("sad", "happy", "angry")


def net(names: tuple[str, ...] | None = None, seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))
    if names is not None:
        model.config = SimpleNamespace(id2label=dict(enumerate(names)))
    return model


def call(student: nn.Module, teacher: nn.Module, **options: Any) -> torch.Tensor:
    transfer = RepresentationTransfer(teacher, **{"distillation": 1.0, "layers": {"0": "0"}, **options})
    with transfer.attached(student):
        student(torch.randn(16, 5, generator=torch.Generator().manual_seed(1)))
        return transfer.loss()


@pytest.mark.parametrize("wrapped", [False, True])
def test_another_order_is_an_error(wrapped: bool) -> None:
    student = net(OTHER_ORDER, seed=1)
    layers = {"0": "0"}
    if wrapped:
        student, layers = nn.Sequential(student), {"0.0": "0"}
    with pytest.raises(ValueError, match="class 0 is 'entailment' for the student and 'contradiction' for the teacher"):
        call(student, net(MNLI), layers=layers)


def test_names_differ_in_more_than_their_case() -> None:
    assert call(net(tuple(map(str.upper, MNLI)), seed=1), net(MNLI)).isfinite()
    with pytest.warns(UserWarning, match="class 0 is 'sad' for the student and 'contradiction' for the teacher"):
        call(net(FEELINGS, seed=1), net(MNLI))


@pytest.mark.parametrize("names", [None, ("LABEL_0", "LABEL_1", "LABEL_2"), ("positive", "negative")])
def test_nothing_is_said_of_classes_without_names(names: tuple[str, ...] | None) -> None:
    """Also where they are those of another head: the networks have three classes."""
    assert call(net(names, seed=1), net(MNLI)).isfinite()
    assert call(net(MNLI, seed=1), net(names)).isfinite()


def test_a_regression_compares_no_classes() -> None:
    assert call(net(OTHER_ORDER, seed=1), net(MNLI), distillation=LogitDistillation(features="0")).isfinite()
    assert call(net(OTHER_ORDER, seed=1), net(MNLI), distillation=0).isfinite()


def test_parts_with_different_names_tell_nothing() -> None:
    assert class_names(nn.ModuleList([net(MNLI), net(MNLI)])) == MNLI
    assert class_names(nn.ModuleList([net(MNLI), net(FEELINGS)])) is None
    assert class_names(nn.ModuleList([net(MNLI), net(("a", "b"))]), 3) == MNLI


def test_a_body_keeps_the_names_of_the_head_that_it_had() -> None:
    body = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
    body.config = SimpleNamespace(id2label=dict(enumerate(OTHER_ORDER)))
    student = nn.Sequential(body, nn.Linear(8, 3))
    assert call(student, net(MNLI), layers={"0.0": "0"}).isfinite()


def test_names_from_json_and_names_that_differ_in_case_alone() -> None:
    model = nn.Linear(2, 3)
    model.config = SimpleNamespace(id2label={"2": "c", "0": "a", "1": "b"})
    assert class_names(model) == ("a", "b", "c")
    model.config = SimpleNamespace(id2label={0: "A", 1: "a", 2: "b"})
    assert class_names(model) == ("A", "a", "b")


def test_a_config_that_fails_says_nothing() -> None:
    class Broken(nn.Linear):
        @property
        def config(self) -> Any:
            raise RuntimeError("not yet")

    assert class_names(Broken(2, 3)) is None


@pytest.mark.parametrize("id2label", [{}, {1: "a", 2: "b"}, ["a", "b"], None])
def test_other_tables_are_no_names(id2label: Any) -> None:
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(id2label=id2label)
    assert class_names(model) is None


def test_models_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers")

    def bert(names: tuple[str, ...] | None, width: int) -> nn.Module:
        named = {"num_labels": 3} if names is None else {"id2label": dict(enumerate(names))}
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
        return transformers.BertForSequenceClassification(transformers.BertConfig(hidden_size=width, **sizes, **named))

    def step(names: tuple[str, ...] | None) -> None:
        student = bert(names, 16)
        transfer = RepresentationTransfer(bert(MNLI, 32), "blocks", distillation=1.0)
        with transfer.attached(student):
            student(torch.arange(16).view(2, 8))
            assert transfer.loss().isfinite()

    step(None)
    step(MNLI)
    with pytest.raises(ValueError, match="in another order: by `config.id2label` class 0"):
        step(OTHER_ORDER)


def test_layers_whose_out_features_are_no_number() -> None:
    """Backbones of transformers have a list of stages there."""
    model = net(FEELINGS)
    model[0].out_features = ["stage1", "stage2"]
    assert class_names(model) == FEELINGS
