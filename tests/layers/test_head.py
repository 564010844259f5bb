"""The classification head of a network, and what enters it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_otrt.layers.head import classification_head, penultimate_names
from lightning_otrt.reading.tracer import trace


@pytest.mark.parametrize(
    ("tail", "head"),
    [
        ([nn.Flatten(), nn.Linear(64, 3)], "3"),
        ([nn.Flatten(), nn.Linear(64, 3), nn.Softmax(1)], "3"),
        ([nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()], "2"),
        ([nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3)], None),
        ([nn.Flatten()], None),
        ([], None),
    ],
)
def test_classification_head(tail, head):
    seen = trace(nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), *tail), (torch.randn(2, 1, 4, 4),))
    found = classification_head(seen)
    assert (found.name if found else None) == head
    assert penultimate_names(seen) == ([f"{head}:input"] if head else [])


def test_a_dropout_before_the_head_is_left_out():
    seen = trace(nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 3)), (torch.randn(4, 6),))
    assert penultimate_names(seen) == ["1:input"]
