"""Readings of forwards that are not part of training."""

from __future__ import annotations

import pytest
import torch
from helpers import hooks, make_teacher
from torch import Tensor, nn

from lightning_otrt.reading.hooks.observer import Observer
from lightning_otrt.reading.neurons.positions import as_matrix
from lightning_otrt.reading.neurons.reader import neurons
from lightning_otrt.reading.tracer import trace


def test_reads_outputs_and_inputs_by_name() -> None:
    net, x = make_teacher().eval(), torch.randn(3, 1, 8, 8)
    observer = Observer("teacher", net, trace(net, (x,)), {"block2": 1, "head:input": 1}, grid=2)
    found = observer(net, (x,), {})
    assert list(found) == ["block2", "head:input"]
    features = net.block2(nn.functional.max_pool2d(net.block1(x), 2))
    torch.testing.assert_close(as_matrix(found["block2"]), neurons(features, neuron_axis=1, grid=2))
    torch.testing.assert_close(as_matrix(found["head:input"]), neurons(features.mean((2, 3))))
    observer.remove()
    assert hooks(net) == []


def test_padding_is_left_out() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.embed(ids)

    net, mask = Words(), torch.tensor([[1, 1, 0], [1, 0, 0]])
    readings = []
    for padding in (0, 8):
        ids = torch.tensor([[1, 2, 3], [4, 5, 6]]).masked_fill(mask == 0, padding)
        observer = Observer("student", net, trace(net, (ids, mask)), {"embed": 2}, grid=1)
        readings.append(observer(net, (ids,), {"attention_mask": mask})["embed"])
    assert torch.equal(*readings)


def test_a_layer_that_runs_another_number_of_times() -> None:
    class Times(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor, times: int = 1) -> Tensor:
            for _ in range(times):
                x = self.layer(x)
            return x

    net, x = Times(), torch.randn(3, 2)
    observer = Observer("student", net, trace(net, (x,)), {"layer": 1}, grid=4)
    for times in (0, 2):
        with pytest.raises(ValueError, match=f"The student layer 'layer' ran {times} times in this forward, but once"):
            observer(net, (x,), {"times": times})
    assert list(observer(net, (x,), {})) == ["layer"]
