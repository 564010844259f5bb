"""Batches of every container are moved, and the inputs of a network are found in them."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_otrt import compare_representations
from lightning_otrt.analysis.batches import batch_inputs, check_accepted, check_batches, to_device

META = torch.device("meta")
Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Batch:
    x: Tensor
    name: str


class Graph:
    """Moves its own tensors, as a batch of graphs does."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Graph:
        return Graph(self.x.to(device))


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: x, lambda moved: moved),
        (lambda x: (1, [x]), lambda moved: moved[1][0]),
        (lambda x: {"a": {"b": x}}, lambda moved: moved["a"]["b"]),
        (lambda x: UserDict(x=x), lambda moved: moved["x"]),
        (lambda x: Pair(x, "name"), lambda moved: moved.x),
        (lambda x: Batch(x, "name"), lambda moved: moved.x),
        (lambda x: [Graph(x)], lambda moved: moved[0].x),
        (lambda x: pack_padded_sequence(x, [3, 2], batch_first=True), lambda moved: moved.data),
    ],
    ids=["tensor", "nested", "mapping", "UserDict", "namedtuple", "dataclass", "graph", "packed"],
)
def test_to_device(wrap: Any, unwrap: Any) -> None:
    batch = wrap(torch.ones(2, 3, 4))
    moved = to_device(batch, META)
    assert type(moved) is type(batch)
    assert unwrap(moved).device == META
    assert unwrap(batch).device.type == "cpu", "the batch of the data loader is left alone"


def test_inputs() -> None:
    x = torch.zeros(2, 3)
    for batch in (x, (x, 1), [x], {"x": x}, UserDict(x=x), Pair(x, 1)):
        args, kwargs = batch_inputs(batch)
        assert [*args, *kwargs.values()][0] is x
    assert batch_inputs(1, lambda batch: (x, x)) == ((x, x), {})
    assert batch_inputs(1, lambda batch: {"a": x}) == ((), {"a": x})


def test_one_batch_in_place_of_batches() -> None:
    with pytest.raises(TypeError, match=r"got one tensor of shape \(2, 3\). If it is one batch, pass it in a list"):
        check_batches(torch.zeros(2, 3))


@pytest.mark.parametrize("batch", [3, ("text",), ()])
def test_batches_without_inputs(batch: Any) -> None:
    with pytest.raises(TypeError, match="Pass `inputs=`"):
        batch_inputs(batch)


def test_batches_that_hold_more_than_inputs() -> None:
    """A mapping with labels: the error says what the network takes."""
    net, images = nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8)
    batches = [{"image": images, "label": torch.zeros(2)}]
    with pytest.raises(TypeError, match=r"Conv2d.forward\(input\) does not take .*'image'.* Pass `inputs=`"):
        compare_representations(net, nn.Conv2d(3, 5, 3), batches, layers=[""], progress=False)
    with pytest.raises(TypeError, match="Pass `inputs=`"):
        check_accepted(net, ((images, images), {}))
    check_accepted(net, ((images,), {}))
    check_accepted(torch.jit.trace(net, images), ((), {"image": images}))
