"""Pairs of layers: their checks, and the way into a saved state and back."""

from __future__ import annotations

import io

import pytest
import torch

from lightning_otrt.layers.pairs import LayerPair, pairs_from_state, pairs_to_state

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


def test_axes_of_both_sides():
    assert LayerPair("a", "b").axes == (None, None)
    assert LayerPair("a", "b", neuron_axis=2).axes == (2, 2)
    assert LayerPair("a", "b", neuron_axis=(1, -1)).axes == (1, -1)


def test_pairs_come_back_from_a_file_that_holds_plain_data_only():
    pairs = (LayerPair("a", "b:input", 0.25, (1, 2), "hidden"), LayerPair("c", "d", 0.75, (1, 1)))
    file = io.BytesIO()
    torch.save(pairs_to_state(pairs), file)
    file.seek(0)
    assert pairs_from_state(torch.load(file, weights_only=True)) == pairs
