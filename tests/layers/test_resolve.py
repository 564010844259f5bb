"""What each form of ``layers=`` resolves to."""

from __future__ import annotations

import pytest
import torch
from layers.networks import Net
from torch import nn

from lightning_otrt.layers.lookup import LayerNames, check_names
from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.layers.resolve import resolve_layers, select_layers
from lightning_otrt.reading.tracer import trace

STAGES = ["layer1", "layer2", "layer3", "layer4"]
GRAMMAR = [
    ({"net.layer4": "layer4"}, [("layer4", "layer4")]),
    ({"layer4": "layer4"}, [("layer4", "layer4")]),
    ({"layer?": "layer?"}, [(name, name) for name in STAGES]),
    ({"net.layer*": "layer*"}, [(name, name) for name in STAGES]),
    ({"re:net.layer[34]": "re:layer[34]"}, [("layer3", "layer3"), ("layer4", "layer4")]),
    ({-1: -2}, [("fc", "layer4")]),
    ({"penultimate": "layer4"}, [("fc:input", "layer4")]),
    ({"_orig_mod.net.module.layer4": "module.layer4"}, [("layer4", "layer4")]),
    (["layer3", "layer4"], [("layer3", "layer3"), ("layer4", "layer4")]),
    (("layer3", "layer4"), [("layer3", "layer3"), ("layer4", "layer4")]),
    ("layer4", [("layer4", "layer4")]),
    ("layer4:input", [("layer4:input", "layer4:input")]),
    ("re:layer[34]:input", [("layer3:input", "layer3:input"), ("layer4:input", "layer4:input")]),
    ("", [("", "")]),
    (-2, [("layer4", "layer4")]),
    ([0, -2], [("layer1", "layer1"), ("layer4", "layer4")]),
    ([("layer4", "layer4"), ["net.layer3", "layer2"]], [("layer4", "layer4"), ("layer3", "layer2")]),
    ([("layer4", "layer4"), ("layer4", "layer3")], [("layer4", "layer4"), ("layer4", "layer3")]),
    (LayerPair("layer4", "layer4"), [("layer4", "layer4")]),
    ([{"student": "layer4", "teacher": "layer3"}, {"layer1": "layer1"}], [("layer4", "layer3"), ("layer1", "layer1")]),
    ("penultimate", [("fc:input", "fc:input")]),
    ("blocks", [(name, name) for name in STAGES]),
    ("auto", [(name, name) for name in STAGES]),
    (["blocks", "penultimate"], [*((name, name) for name in STAGES), ("fc:input", "fc:input")]),
]


@pytest.mark.parametrize(("spec", "expected"), GRAMMAR, ids=[str(spec) for spec, _ in GRAMMAR])
def test_grammar(spec, expected, student, teacher):
    pairs = resolve_layers(spec, student, teacher)
    assert [(pair.student, pair.teacher) for pair in pairs] == [
        (f"net.{name}" if name else "net", teacher_name) for name, teacher_name in expected
    ]
    assert sum(pair.weight for pair in pairs) == pytest.approx(1)
    assert all(pair.weight == pytest.approx(1 / len(pairs)) for pair in pairs)
    assert {pair.neuron_axis for pair in pairs} == {(1, 1)}
    for root in ("net", None):
        check_names(spec, LayerNames("student", student.names(), root), LayerNames("teacher", teacher.names()))


def test_weights_are_relative_and_shared_by_every_layer_of_a_pattern(student, teacher):
    spec = [LayerPair("layer[12]", "layer[12]", weight=3.0), {"student": "layer4", "teacher": "layer4", "weight": 2}]
    assert [pair.weight for pair in resolve_layers(spec, student, teacher)] == pytest.approx([3 / 8, 3 / 8, 2 / 8])


def test_select_and_given_axis(odd):
    (pair,) = resolve_layers(LayerPair("mapping", "fc", select="hidden"), odd, odd)
    assert (pair.select, pair.neuron_axis) == ("hidden", (1, 1))
    assert resolve_layers([("one", "named")], odd, odd)[0].neuron_axis == (1, 1)
    assert resolve_layers(LayerPair("two", "two", select=1), odd, odd)[0].select == 1
    assert resolve_layers(LayerPair("cube", "cube", neuron_axis=(-3, 1)), odd, odd)[0].neuron_axis == (1, 1)
    assert len(resolve_layers([LayerPair("two", "two", select=0), LayerPair("two", "two", select=1)], odd, odd)) == 2


def test_a_module_with_two_names_is_one_layer():
    net = Net()
    net.backbone = nn.Sequential(net.layer1, net.layer2)
    seen = trace(net, (torch.randn(2, 3, 16, 16),))
    assert resolve_layers("backbone.1", seen, seen)[0].student == "layer2"
    with pytest.raises(ValueError, match="'layer2' -> 'layer2' is named twice"):
        resolve_layers(["layer2", "backbone.1"], seen, seen)


def test_select_layers_of_one_model(student):
    assert select_layers(["layer[12]", -1, "penultimate"], student, "student") == {
        "net.layer1": 1,
        "net.layer2": 1,
        "net.fc": 1,
        "net.fc:input": 1,
    }
    with pytest.raises(ValueError, match="No layer 'layr1' in the teacher"):
        select_layers(["layr1"], student, "teacher")


def test_matched_needs_activations_and_takes_them_as_they_are(student, teacher):
    with pytest.raises(ValueError, match='"matched" pairs layers by their activations'):
        resolve_layers("matched", student, teacher)
    found = resolve_layers("matched", student, teacher, lambda: [("net.layer1", "layer3"), ("net.layer2", "layer4")])
    assert [(pair.student, pair.teacher, pair.weight) for pair in found] == [
        ("net.layer1", "layer3", 0.5),
        ("net.layer2", "layer4", 0.5),
    ]


class TestOneAxisForBothSides:
    """A student whose axis is not known, and a teacher whose axis the types of its modules tell."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bchw,cd->bhwd", x, self.weight)

    def pairs(self, axis):
        x = torch.randn(2, 3, 6, 6)
        student, teacher = nn.Sequential(self.Mixed()), nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        return resolve_layers([LayerPair("0", "1", neuron_axis=axis)], trace(student, (x,)), trace(teacher, (x,)))

    def test_it_is_refused_where_it_is_not_that_of_the_types(self):
        message = r"teacher layer '1' of shape \(2, 4, 6, 6\) has its neurons on axis 1. Write neuron_axis=\(-1, 1\)"
        with pytest.raises(ValueError, match=message):
            self.pairs(-1)

    @pytest.mark.parametrize(("axis", "expected"), [((-1, 1), (3, 1)), ((-1, -1), (3, 3)), (1, (1, 1))])
    def test_two_axes_are_taken_as_they_are(self, axis, expected):
        assert [pair.neuron_axis for pair in self.pairs(axis)] == [expected]

    def test_the_error_without_an_axis_names_both_forms(self):
        with pytest.raises(ValueError, match=r"ambiguous neuron axis.* or two, \(student, teacher\)"):
            self.pairs(None)


def test_a_duplicate_that_a_fallback_makes_is_explained():
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    seen = trace(net, (torch.randn(4, 5),))
    with pytest.raises(ValueError, match=r'"auto" uses "penultimate"\. .* is named twice in `layers`'):
        resolve_layers(["auto", "penultimate"], seen, seen)
