"""The layers chosen in well-known architectures, by name. Weights are random and inputs small."""

from __future__ import annotations

import functools

import pytest
from helpers import with_slow
from zoo import CASES, RESNET, VIT, Case, timm_model

from lightning_otrt.layers.resolve import resolve_layers
from lightning_otrt.layers.table import format_pairs
from lightning_otrt.layers.trace import Trace


@functools.cache
def traced(name: str) -> Trace:
    """The trace of a model is plain data, which several tests can read."""
    return CASES[name].trace()


@pytest.mark.parametrize("name", with_slow(CASES, "vgg11", "vit_b_16", "densenet121"))
def test_chosen_layers(name):
    case, student = CASES[name], traced(name)
    teacher = student

    def chosen(word: str) -> list[str]:
        pairs = resolve_layers(word, student, teacher)
        assert [pair.student for pair in pairs] == [pair.teacher for pair in pairs]
        return [pair.student for pair in pairs]

    assert chosen("blocks") == case.blocks
    assert chosen("auto") == case.blocks
    assert chosen("penultimate") == [case.penultimate]
    assert student.prefix_tokens == case.prefix_tokens
    assert len(resolve_layers(["blocks", "penultimate"], student, teacher)) == len(case.blocks) + 1
    assert len(format_pairs(resolve_layers("auto", student, teacher), student, teacher).splitlines()) == 1 + len(
        case.blocks
    )


def test_axes_of_channels_last_maps_and_tokens():
    swin, bert = traced("swin_t"), traced("BERT")
    assert {pair.neuron_axis for pair in resolve_layers("blocks", swin, swin)} == {(3, 3)}
    assert {pair.neuron_axis for pair in resolve_layers("blocks", bert, bert)} == {(2, 2)}


ACROSS = [
    ("resnet18", "small vit", list(zip(RESNET, [VIT[0], VIT[1], VIT[2], VIT[3], VIT[3]], strict=True))),
    ("small vit", "resnet18", list(zip(VIT, ["relu", "layer1", "layer2", "layer4"], strict=True))),
    (
        "mobilenet_v3_small",
        "resnet18",
        list(zip(CASES["mobilenet_v3_small"].blocks, RESNET, strict=True)),
    ),
    (
        "convnext_tiny",
        "resnet18",
        list(zip(CASES["convnext_tiny"].blocks, RESNET[1:], strict=True)),
    ),
]


@pytest.mark.parametrize(("student", "teacher", "expected"), ACROSS, ids=[f"{s} from {t}" for s, t, _ in ACROSS])
def test_across_architectures(student, teacher, expected):
    traces = traced(student), traced(teacher)
    assert [(pair.student, pair.teacher) for pair in resolve_layers("auto", *traces)] == expected
    (pair,) = resolve_layers("penultimate", *traces)
    assert (pair.student, pair.teacher) == (CASES[student].penultimate, CASES[teacher].penultimate)


def test_a_network_without_head_has_blocks_alone():
    seen = Case(timm_model("resnet10t", num_classes=0), [], "").trace()
    assert [pair.student for pair in resolve_layers("auto", seen, seen)][-1] == "layer4"
    with pytest.raises(ValueError, match=r"No classification head was found in the student \(ResNet\)"):
        resolve_layers("penultimate", seen, seen)
