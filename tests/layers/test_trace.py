"""What a trace says of its layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor
from lightning_otrt.reading.tracer import trace

MAP = TracedTensor((2, 4, 6, 5), neuron_axis=1)


def test_positions():
    assert MAP.positions == (6, 5)
    assert TracedTensor((7, 2, 4), neuron_axis=2, batch_axis=1).positions == (7,)
    assert TracedTensor((2, 4), neuron_axis=1).positions == ()


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (TracedLayer("a", calls=1, output=MAP), True),
        (TracedLayer("a", calls=0), False),
        (TracedLayer("a", calls=2, output=MAP), False),
        (TracedLayer("a", calls=1), False),
        (TracedLayer("fc.parametrizations.weight.0", calls=1, output=MAP), False),
        (TracedLayer("a", calls=1, output=TracedTensor((2, 4), "int64", is_floating=False)), False),
        (TracedLayer("a", calls=1, output=TracedTensor((2,))), False),
    ],
)
def test_is_recordable(layer, expected):
    assert layer.is_recordable is expected


def test_indices_are_the_same_inside_a_lightning_module(student, teacher):
    assert [layer.name for layer in student.recordable()] == [f"net.{layer.name}" for layer in teacher.recordable()]


def test_a_network_in_a_network_in_a_network_counts_its_layers_alone():
    net = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU())))
    assert [layer.name for layer in trace(net, (torch.randn(2, 3),)).recordable()] == ["0.0.0", "0.0.1"]


def test_layers_by_name():
    parts = (("hidden", MAP), ("other", TracedTensor((2, 4))))
    seen = Trace((TracedLayer("a", input=MAP), TracedLayer("b", parts=parts)), aliases=(("c", "a"),))
    assert seen.layer("c").name == seen.layer("a:input").name == "a"
    assert (seen.tensor("a:input"), seen.tensor("a"), seen.tensor("b", "hidden")) == (MAP, None, MAP)
    assert seen.tensor("b", "none") is None
    assert seen.names() == ("a", "b", "c")
    with pytest.raises(KeyError, match="d"):
        seen.layer("d")
