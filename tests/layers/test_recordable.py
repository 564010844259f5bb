"""Layers that cannot be recorded, and the errors that say why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.layers.resolve import resolve_layers
from lightning_otrt.reading.tracer import trace

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
    ("listed:input", ["gets no tensor as an argument"]),
    ("cube", ["'cube' (Gives) of shape (4, 5, 1, 1) has an ambiguous neuron axis", "`neuron_axis`"]),
    (LayerPair("cube", "cube", neuron_axis=4), ["`neuron_axis` to lie in [-4, 3], but got 4"]),
    (LayerPair("fc", "fc", neuron_axis=0), ["`neuron_axis` 0 is the axis of the samples"]),
    (99, ["Index 99 is out of range in the student", "[-", "recordable layers"]),
    ("blocks", ["finds none in the student (Odd)", "which axis of 'cube'", "neuron_axis=1"]),
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
    with pytest.raises(ValueError, match=r"'head' \(Linear\) of the student \(Shared\) ran 2 times"):
        resolve_layers("penultimate", seen, seen)
