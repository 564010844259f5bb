"""The grammar of ``layers=`` and each of its errors."""

from __future__ import annotations

from collections import namedtuple

import jsonargparse
import pytest
import torch
from torch import Tensor, nn

from lightning_otrt.layers.grammar import parse_layers
from lightning_otrt.layers.lookup import LayerNames, check_names
from lightning_otrt.layers.names import named_layers, named_tensors
from lightning_otrt.layers.pairs import LayerPair, LayerSpec
from lightning_otrt.layers.resolve import resolve_layers
from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor
from lightning_otrt.reading.tracer import trace

# Its name until 4.37; the newer versions deprecate that.
auto_cli = jsonargparse.auto_cli if hasattr(jsonargparse, "auto_cli") else jsonargparse.CLI

Halves = namedtuple("Halves", ["left", "right"])


class Net(nn.Module):
    """Four stages and a head, of any width."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(3, width, 3, padding=1)
        self.layer2 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.layer3 = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.ReLU())
        self.layer4 = nn.Conv2d(2 * width, 3 * width, 3, 2, 1)
        self.fc = nn.Linear(3 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


class Task(nn.Module):
    """As a LightningModule that holds the network and more."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Gives(nn.Module):
    """Gives what a function makes of its input."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


class Odd(nn.Module):
    """One module for each thing that cannot be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.twice = nn.ReLU()
        self.unused = nn.Linear(6, 5)
        self.stack = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.mapping = Gives(lambda x: {"hidden": x, "pooled": x.mean(1)})
        self.two = Gives(lambda x: (x, 2 * x))
        self.one = Gives(lambda x: (x, None))
        self.named = Gives(lambda x: Halves(x, None))
        self.boxes = Gives(lambda x: ["box"])
        self.integer = Gives(lambda x: x.long())
        self.boolean = Gives(lambda x: x > 0)
        self.complex = Gives(lambda x: x.to(torch.complex64))
        self.scalar = Gives(lambda x: x.mean())
        self.vector = Gives(lambda x: x.mean(1))
        self.cube = Gives(lambda x: x[:, :, None, None].clone())
        self.keyword = Gives(lambda x: x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.fc(x)))
        for layer in self.stack:
            x = layer(x)
        for name, module in self.named_children():
            if isinstance(module, Gives) and name != "keyword":
                module(x)
        return self.keyword(x=x)


@pytest.fixture(scope="module")
def student() -> Trace:
    return trace(Task(), (torch.randn(2, 3, 16, 16),), root="net")


@pytest.fixture(scope="module")
def teacher() -> Trace:
    return trace(Net(8), (torch.randn(2, 3, 16, 16),))


@pytest.fixture(scope="module")
def odd() -> Trace:
    return trace(Odd(), (torch.randn(4, 6),))


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


def with_all_forms(layers: LayerSpec = "auto") -> object:
    return layers


def test_yaml_gives_a_layer_pair():
    def command(layers: list[LayerPair] | dict[str, str] | str) -> object:
        return layers

    assert auto_cli(with_all_forms, args=["--layers=-1"], as_positional=False) == -1
    given = ['--layers=[{"student": "a", "teacher": "b", "weight": 2, "neuron_axis": [1, 2]}]']
    assert auto_cli(command, args=given, as_positional=False) == [LayerPair("a", "b", 2.0, (1, 2))]
    assert LayerPair("a", "b", neuron_axis=[1, -1]).neuron_axis == (1, -1)
    assert parse_layers([{"student": "a", "teacher": "b", "select": 0}])[0].select == 0


def test_select_and_given_axis(odd):
    (pair,) = resolve_layers(LayerPair("mapping", "fc", select="hidden"), odd, odd)
    assert (pair.select, pair.neuron_axis) == ("hidden", (1, 1))
    assert resolve_layers([("one", "named")], odd, odd)[0].neuron_axis == (1, 1)
    assert resolve_layers(LayerPair("two", "two", select=1), odd, odd)[0].select == 1
    assert resolve_layers(LayerPair("cube", "cube", neuron_axis=(-3, 1)), odd, odd)[0].neuron_axis == (1, 1)
    assert len(resolve_layers([LayerPair("two", "two", select=0), LayerPair("two", "two", select=1)], odd, odd)) == 2


def test_blocks_are_paired_by_depth():
    def chain(count: int) -> Trace:
        layers = [
            TracedLayer(f"b{i}", order=i, calls=1, output=TracedTensor((2, 4, 2 ** (9 - i)), neuron_axis=1))
            for i in range(count)
        ]
        return Trace((TracedLayer("", order=count, calls=1, is_container=True), *layers), batch_size=2)

    def teachers(n_student: int, n_teacher: int) -> list[str]:
        return [pair.teacher for pair in resolve_layers("blocks", chain(n_student), chain(n_teacher))]

    assert teachers(3, 3) == ["b0", "b1", "b2"]
    assert teachers(1, 4) == ["b3"]
    assert teachers(3, 5) == ["b0", "b2", "b4"]
    assert teachers(5, 2) == ["b0", "b0", "b0", "b1", "b1"]
    assert teachers(3, 1) == ["b0", "b0", "b0"]


def test_a_module_with_two_names_is_one_layer():
    net = Net()
    net.backbone = nn.Sequential(net.layer1, net.layer2)
    seen = trace(net, (torch.randn(2, 3, 16, 16),))
    assert resolve_layers("backbone.1", seen, seen)[0].student == "layer2"
    with pytest.raises(ValueError, match="'layer2' -> 'layer2' is named twice"):
        resolve_layers(["layer2", "backbone.1"], seen, seen)


NAME_ERRORS = [
    ({"net.layr3.0": "layer3"}, ["No layer 'net.layr3.0' in the student", "Did you mean 'net.layer3.0'", "net.layer4"]),
    ({"net.layer3.9": "layer3"}, ["Available at this depth: 'net.layer3.0', 'net.layer3.1'."]),
    ({"net.layer3": "layr3"}, ["No layer 'layr3' in the teacher", "Did you mean 'layer3'"]),
    ({"layer3": "net.layer3"}, ["No layer 'net.layer3' in the teacher", "exists in the student", "swapped"]),
    ("criterio", ["No layer 'criterio' in the student", "Did you mean 'criterion'"]),
    ({"laxer?": "layer?"}, ["Pattern 'laxer?' matches no layer of the student", "'net.layer3.0'"]),
    ({"layer3": "re:laxer."}, ["Regex 're:laxer.' matches no layer of the teacher", "'layer3.0'"]),
    ("re:layer[3", ["Invalid regex 'layer[3'", "unterminated character set", "at position 5"]),
    ({"layer?": "re:layer[34]"}, ["4 student layers but 2 teacher", "'net.layer1'", "Teacher: 'layer3', 'layer4'"]),
    ([], ["at least one layer pair", "[]"]),
    ({}, ["at least one layer pair"]),
    (["layer4", "layer4"], ["'net.layer4' -> 'layer4' is named twice"]),
    (["net.layer4", "layer?"], ["No layer 'net.layer4' in the teacher"]),
    ([("net.layer4", "layer4"), "layer?"], ["'net.layer4' -> 'layer4' is named twice"]),
    ({"auto": "layer4"}, ['"auto" chooses the layers of both sides', "'auto' -> 'layer4'"]),
    ({"net.layer1.weight": "layer1"}, ["is a Parameter of shape (4, 3, 3, 3), not a module", "'net.layer1'"]),
    ("layer1.bias", ["'net.layer1.bias' in the student is a Parameter of shape (4,)"]),
]


@pytest.mark.parametrize(("spec", "words"), NAME_ERRORS, ids=[str(spec) for spec, _ in NAME_ERRORS])
def test_name_errors_come_before_any_forward_and_at_resolve(spec, words, student, teacher):
    task, net = Task(), Net(8)
    with pytest.raises(ValueError) as early:
        check_names(
            spec,
            LayerNames("student", tuple(named_layers(task)), "net", tensors=named_tensors(task)),
            LayerNames("teacher", tuple(named_layers(net))),
        )
    assert all(word in str(early.value) for word in words), str(early.value)
    with pytest.raises(ValueError) as late:
        resolve_layers(spec, student, teacher)
    if "Parameter" not in words[0]:
        assert all(word in str(late.value) for word in words), str(late.value)


def test_long_lists_of_names_are_cut():
    with pytest.raises(ValueError, match="'layer19' and 11 more"):
        check_names("x*", LayerNames("student", tuple(f"layer{i}" for i in range(31))), LayerNames("teacher", ("x",)))


def test_unknown_root_accepts_names_below_a_child(teacher):
    names = tuple(named_layers(Task()))
    check_names("layer?", LayerNames("student", names, None), LayerNames("teacher", teacher.names()))
    with pytest.raises(ValueError, match="No layer 'layer4' in the student. Did you mean 'net.layer4'"):
        check_names("layer4", LayerNames("student", names), LayerNames("teacher", teacher.names()))


FORM_ERRORS = [
    (3.5, TypeError, "3.5 of type float"),
    (None, TypeError, "None of type NoneType"),
    (True, TypeError, "True of type bool"),
    ([("a", "b", "c")], TypeError, "('a', 'b', 'c') of type tuple"),
    ([("a", 1.5)], TypeError, "1.5 of type float"),
    ({"a": None}, TypeError, "None of type NoneType"),
    ([{"student": "a", "teacher": "b", "wieght": 1}], TypeError, "['wieght']"),
    ([{"student": "a", "teacher": "b", "weight": -1}], ValueError, "`weight` of layer pair 'a' -> 'b' to be positive"),
    ([{"student": "a", "teacher": "b", "weight": "1"}], TypeError, "to be a number, but got '1'"),
]


@pytest.mark.parametrize(("spec", "error", "words"), FORM_ERRORS)
def test_wrong_forms(spec, error, words):
    with pytest.raises(error) as raised:
        parse_layers(spec)
    assert words in str(raised.value)


PAIR_ERRORS = [
    ({"student": 1}, TypeError, "`student` of a LayerPair"),
    ({"teacher": None}, TypeError, "`teacher` of a LayerPair"),
    ({"weight": 0.0}, ValueError, "positive and finite, but got 0.0"),
    ({"weight": float("nan")}, ValueError, "but got nan"),
    ({"weight": float("inf")}, ValueError, "but got inf"),
    ({"weight": True}, TypeError, "a number, but got True"),
    ({"neuron_axis": 1.0}, TypeError, "(student axis, teacher axis), but got 1.0"),
    ({"neuron_axis": (1, 2, 3)}, TypeError, "but got (1, 2, 3)"),
    ({"select": 1.5}, TypeError, "a key or an index, but got 1.5"),
]


@pytest.mark.parametrize(("fields", "error", "words"), PAIR_ERRORS)
def test_layer_pair_validates(fields, error, words):
    with pytest.raises(error) as raised:
        LayerPair(**{"student": "a", "teacher": "b"} | fields)
    assert words in str(raised.value)


RESOLVE_ERRORS = [
    ("unused", ["Student layer 'unused' (Linear) did not run", "branch", "Name a layer that runs"]),
    ([("fc", "unused")], ["Teacher layer 'unused' (Linear) did not run"]),
    ("stack", ["'stack' (ModuleList) is a container that is never called", "Name a child: 'stack.0', 'stack.1'"]),
    ("twice", ["'twice' (ReLU) ran 2 times"]),
    (
        "mapping",
        [
            "returns dict(hidden: float32 (4, 5), pooled: float32 (4,)), not one tensor",
            "select='hidden'",
            "['hidden', 'pooled']",
        ],
    ),
    ("two", ["returns tuple(float32 (4, 5), float32 (4, 5)), not one tensor", "select=0"]),
    (LayerPair("mapping", "fc", select="x"), ["without a tensor at select='x'", "['hidden', 'pooled']"]),
    (LayerPair("fc", "fc", select=0), ["select=0 chooses nothing for 'fc' -> 'fc'", "Remove `select`"]),
    ("boxes", ["returns list(str), which holds no tensor"]),
    ("integer", ["returns int64 of shape (4, 5)", "floating-point"]),
    ("boolean", ["returns bool of shape (4, 5)"]),
    ("complex", ["returns complex64 of shape (4, 5)"]),
    ("scalar", ["returns float32 of shape ()", "(batch, neurons, ...)"]),
    ("vector", ["returns float32 of shape (4,)", "(batch, neurons, ...)"]),
    ("keyword:input", ["gets no tensor as a positional argument"]),
    ("cube", ["'cube' (Gives) of shape (4, 5, 1, 1) has an ambiguous neuron axis", "`neuron_axis`"]),
    (LayerPair("cube", "cube", neuron_axis=4), ["`neuron_axis` to lie in [-4, 3], but got 4"]),
    (LayerPair("fc", "fc", neuron_axis=0), ["`neuron_axis` 0 is the axis of the samples"]),
    (99, ["Index 99 is out of range in the student", "[-", "recordable layers"]),
    ("blocks", ["No layer of the student (Odd) has positions or tokens", '"penultimate"']),
    ("penultimate", ["No classification head was found in the student (Odd)", "Name the layer"]),
]


@pytest.mark.parametrize(("spec", "words"), RESOLVE_ERRORS, ids=[str(spec) for spec, _ in RESOLVE_ERRORS])
def test_layers_that_give_no_representation(spec, words, odd):
    with pytest.raises(ValueError) as raised:
        resolve_layers(spec, odd, odd)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_layer_outside_of_the_traced_root(student, teacher):
    with pytest.raises(ValueError, match="'criterion' .* the forward of .net. was traced, .* not inside it"):
        resolve_layers({"criterion": "fc"}, student, teacher)


def test_input_of_an_embedding_is_not_a_representation():
    seen = trace(nn.Sequential(nn.Embedding(9, 4)), (torch.randint(0, 9, (2, 3)),))
    with pytest.raises(ValueError, match=r"'0' \(Embedding\) receives int64"):
        resolve_layers("0:input", seen, seen)


def test_a_head_that_is_shared_ran_twice():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)) + self.head(x)

    seen = trace(Shared(), (torch.randn(3, 4),))
    with pytest.raises(ValueError, match=r"'head' \(Linear\) ran 2 times"):
        resolve_layers("penultimate", seen, seen)
