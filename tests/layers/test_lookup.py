"""How names, globs and regexes are looked up, and the errors of those that are not found."""

from __future__ import annotations

import pytest
from layers.networks import Net, Task

from lightning_otrt.layers.lookup import LayerNames, check_names
from lightning_otrt.layers.names import named_layers, named_tensors
from lightning_otrt.layers.resolve import resolve_layers

NAME_ERRORS = [
    ({"net.layr3.0": "layer3"}, ["No layer 'net.layr3.0' in the student", "Did you mean 'net.layer3.0'", "net.layer4"]),
    ({"net.layer3.9": "layer3"}, ["Available at this depth: 'net.layer3.0', 'net.layer3.1'."]),
    ({"net.layer3": "layr3"}, ["No layer 'layr3' in the teacher", "Did you mean 'layer3'"]),
    ({"layer3": "net.layer3"}, ["No layer 'net.layer3' in the teacher", "exists in the student", "swapped"]),
    ("block", ["No layer 'block' in the student", "Did you mean 'blocks'"]),
    ("penultimat", ["Did you mean 'penultimate'"]),
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
