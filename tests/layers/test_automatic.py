"""The rule behind "blocks" on small networks; ``test_model_zoo.py`` has them on well-known ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_otrt.layers.automatic import adds_nothing, evenly_spaced
from lightning_otrt.layers.resolve import resolve_layers
from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor
from lightning_otrt.reading.tracer import trace


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
    # Equal resolutions go together, whatever comes after them.
    assert teachers(1, 4) == ["b0"]
    assert teachers(3, 5) == ["b0", "b1", "b2"]
    # Too few resolutions in common: by depth.
    assert teachers(5, 2) == ["b0", "b0", "b1", "b1", "b1"]
    assert teachers(3, 1) == ["b0", "b0", "b0"]


def test_auto_without_positions_on_one_side_is_penultimate(student):
    mlp = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3))
    seen = trace(mlp, (torch.randn(4, 6),))
    assert [pair.student for pair in resolve_layers("auto", seen, seen)] == ["2:input"]
    assert [pair.student for pair in resolve_layers("auto", student, seen)] == ["net.fc:input"]


def test_dense_prediction_never_matches_its_own_output():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1))
    seen = trace(nn.Sequential(net), (torch.randn(2, 3, 16, 16),))
    assert [pair.student for pair in resolve_layers("blocks", seen, seen)] == ["0.2"]


def test_evenly_spaced_names_are_the_last_of_equal_parts():
    assert evenly_spaced(4, "abcd") == list("abcd")
    assert evenly_spaced(2, "abcdef") == ["c", "f"]
    assert evenly_spaced(1, "abcd") == ["d"]
    assert evenly_spaced(4, "ab") == ["a", "a", "b", "b"]
    assert evenly_spaced(5, "abcd") == ["a", "b", "c", "d", "d"]


@pytest.mark.parametrize(
    ("layer", "size", "expected"),
    [(nn.MaxPool2d(2), 8, False), (nn.AdaptiveAvgPool2d(7), 2, True), (nn.Dropout(), 8, True)]
    + [(nn.Identity(), 8, True), (nn.ReLU(), 8, False)],
)
def test_adds_nothing(layer, size, expected):
    seen = trace(nn.Sequential(nn.Conv2d(1, 2, 1), layer), (torch.randn(2, 1, size, size),))
    assert adds_nothing(seen.layer("1")) is expected


def test_a_gate_with_one_neuron_is_no_block():
    class Gate(nn.Module):
        """Of a size of its own, behind the convolution with one channel."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 1, 3)

        def forward(self, x):
            return self.conv(x).sigmoid()

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate, self.last, self.head = nn.Conv2d(3, 4, 3), Gate(), nn.Conv2d(4, 5, 3), nn.Linear(5, 2)

        def forward(self, x):
            x = self.conv(x)
            return self.head((self.last(x) * self.gate(x)[..., :1, :1]).mean((2, 3)))

    seen = trace(Gated(), (torch.randn(4, 3, 16, 16),))
    names = [pair.student for pair in resolve_layers("auto", seen, seen)]
    assert {"gate", "gate.conv"}.isdisjoint(names)
    assert "conv" in names
