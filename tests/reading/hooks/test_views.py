"""From views to the neurons of pairs, and why there are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.reading.hooks.views import (
    NeuronCounts,
    NoTermError,
    View,
    matched_neurons,
    trained_views,
    why_absent,
)

PAIRS = [LayerPair("a", "x"), LayerPair("b", "y")]
COUNTS = [NeuronCounts(3, 7, (torch.float32, torch.float32)), NeuronCounts(3, 7, (torch.float32, torch.float64))]


def recorded(*students: list[Tensor]) -> View:
    teacher = {index: [torch.ones(5, 7)] for index in range(len(students))}
    return View("", {index: readings for index, readings in enumerate(students)}, teacher)


def reading(trained: bool = True) -> Tensor:
    return torch.randn(5, 3, requires_grad=trained)


def test_gradient_of_a_view() -> None:
    view = View("")
    assert not view.has_gradient
    view.student = {0: [torch.zeros(1)], 1: [torch.zeros(1), torch.zeros(1, requires_grad=True)]}
    assert view.has_gradient
    view.student[1].pop()
    view.teacher = {0: [torch.zeros(1, requires_grad=True)]}
    assert not view.has_gradient


def test_samples_of_a_view() -> None:
    assert View("").samples([1, 1]) == 0
    assert recorded([reading()]).samples([1, 1]) == 5
    assert recorded([reading()]).samples([5, 1]) == 1
    assert recorded([reading()]).samples([8, 1]) == 1, "fewer frames than in the trace"
    assert View("", logits=torch.zeros(7, 3)).samples([1, 1]) == 7


def test_views_without_gradient_are_left_out_unless_all_are() -> None:
    trained, frozen = recorded([reading()]), recorded([reading(False)])
    assert trained_views([frozen, trained]) == [trained]
    assert trained_views([frozen]) == [frozen]
    empty = View("")
    assert trained_views([frozen, empty, trained]) == [empty, trained]
    assert trained_views([]) == []


def test_neurons_of_each_view_and_pair() -> None:
    views = [recorded([reading()], [reading(False)]) for _ in range(2)]
    matched, constant, absent = matched_neurons(views, PAIRS, COUNTS)
    assert (constant, absent) == (["b"], {})
    assert {(tuple(y.shape), tuple(x.shape)) for view in matched for y, x in view} == {((3, 5), (7, 5))}
    assert [len(view) for view in matched] == [2, 2]
    assert torch.equal(matched[1][0][0], views[1].student[0][0].T)


def test_a_reading_without_gradient_beside_one_with_is_from_a_trace() -> None:
    view = recorded([reading(False), reading()])
    assert torch.equal(matched_neurons([view], PAIRS[:1], COUNTS).neurons[0][0][0], view.student[0][1].T)


@pytest.mark.parametrize(
    ("view", "words"),
    [
        (recorded([reading(), reading()]), "The student layer 'a' ran 2 times in this forward, but once when"),
        (recorded([reading(False)]), r"The transfer term is constant: the outputs of the student layers \['a'\]"),
    ],
)
def test_why_there_is_no_term(view: View, words: str) -> None:
    with pytest.raises(NoTermError, match=words):
        matched_neurons([view], PAIRS[:1], COUNTS)


def test_a_layer_that_did_not_run_has_no_observations() -> None:
    ran, skipped = recorded([reading()], [reading()]), recorded([reading()])
    neurons, constant, absent = matched_neurons([ran, skipped], PAIRS, COUNTS)
    assert (constant, absent) == ([], {})
    assert [[(tuple(y.shape), tuple(x.shape)) for y, x in view] for view in neurons] == [
        [((3, 5), (7, 5)), ((3, 5), (7, 5))],
        [((3, 5), (7, 5)), ((3, 0), (7, 0))],
    ]
    assert [side.dtype for side in neurons[1][1]] == [torch.float32, torch.float64]


@pytest.mark.parametrize(
    ("view", "layer"),
    [
        (View(""), "student layer 'a'"),
        (View("", {}, {0: [torch.ones(5, 7)]}), "student layer 'a'"),
        (View("", {0: [reading()]}), "teacher layer 'x'"),
    ],
)
def test_which_layer_did_not_run(view: View, layer: str) -> None:
    assert matched_neurons([view], PAIRS[:1], COUNTS).absent == {0: layer}
    assert f"The {layer} did not run in this forward nor in any before" in why_absent([layer])


def test_a_constant_layer_beside_one_that_did_not_run_is_no_error() -> None:
    assert matched_neurons([recorded([reading(False)])], PAIRS, COUNTS).constant == ["a"]
