"""What modules return: which tensor is taken, and how errors describe the rest."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lightning_otrt import neurons
from lightning_otrt.reading.neurons.outputs import describe, output_items, returned_tensors, select_tensor


class Opaque:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


@dataclass(slots=True)
class Slots:
    hidden: Any


Pair = namedtuple("Pair", ["hidden", "other"])
X, Z = torch.randn(4, 6), torch.randn(4, 3)


@pytest.mark.parametrize(
    ("output", "select"),
    [
        (X, None),
        (X, "ignored"),
        ((X,), None),
        ([X], None),
        ((X, None), None),
        ((X, torch.Size([2, 3])), None),  # Swin: tokens and their rows and columns
        ((X, object()), None),  # tokens and a cache
        ((None, X, [Z, Z]), None),
        ((X, Z), 0),
        ((Z, X), -1),
        (Pair(X, Z), 0),
        ({"x": X, "z": Z}, "x"),
        (OrderedDict(x=X), "x"),
        ({"x": (X, None)}, "x"),
        (Output(X), "logits"),
        (SimpleNamespace(hidden=X, other=Z), "hidden"),
        (Slots((X, None)), "hidden"),
        (BaseModelOutputWithPooling(last_hidden_state=Z, pooler_output=X), "pooler_output"),
        (BaseModelOutputWithPooling(last_hidden_state=X), "last_hidden_state"),
        (BaseModelOutputWithPooling(last_hidden_state=X), 0),
    ],
)
def test_select(output: Any, select: str | int | None) -> None:
    assert select_tensor(output, select, "layer") is X
    assert torch.equal(neurons(output, select=select), X.T)


@pytest.mark.parametrize(
    ("output", "select", "error", "words"),
    [
        (
            (X, Z),
            None,
            TypeError,
            r"layer: its output is not one tensor but tuple\(float32 \(4, 6\), float32",
        ),
        ((X, Z, 1), None, TypeError, r"float32 \(4, 3\), int\). Choose one with `select=`"),
        ((), None, TypeError, r"not one tensor but tuple\(\)"),
        ((None,), None, TypeError, "not one tensor"),
        ({"x": X}, None, TypeError, r"not one tensor but dict\(x: float32 \(4, 6\)\). Choose one with `select=`"),
        ({"x": X}, "y", ValueError, r"layer: its output has no 'y'; it is dict\(x: float32 \(4, 6\)\)"),
        ((X, Z), 2, ValueError, r"has no 2; it is tuple\("),
        ((X, Z), "x", ValueError, r"has no 'x'"),
        (
            BaseModelOutputWithPooling(last_hidden_state=X),
            "logits",
            ValueError,
            r"\(last_hidden_state: float32",
        ),
        (Output(X), None, TypeError, r"but Output\(logits: float32 \(4, 6\), loss: None\). Choose one with `select=`"),
        (Output(X), "hidden", ValueError, "has no 'hidden'"),
        (Opaque(X), None, TypeError, "expected its output to be a tensor, but got Opaque"),
        (Opaque(X), "tensor", ValueError, "has no 'tensor'; it is Opaque"),
        ("text", None, TypeError, "but got str"),
        (None, None, TypeError, "but got NoneType"),
        (X.long(), None, TypeError, r"floating-point output, but got int64 \(4, 6\)"),
        (X * 1j, None, TypeError, "but got complex64"),
        (X > 0, None, TypeError, "but got bool"),
    ],
)
def test_select_errors(output: Any, select: str | int | None, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        select_tensor(output, select, "layer")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (X, "float32 (4, 6)"),
        (X.bfloat16()[0, 0], "bfloat16 ()"),
        ((X, None, 3), "tuple(float32 (4, 6), None, int)"),
        (Pair(X, Z), "Pair(float32 (4, 6), float32 (4, 3))"),
        ({"x": [X, X]}, "dict(x: list)"),
        (Opaque(X), "Opaque"),
        (Slots(X), "Slots(hidden: float32 (4, 6))"),
        (Output, "type"),
        (None, "None"),
    ],
)
def test_describe(value: Any, words: str) -> None:
    assert describe(value) == words


def test_items() -> None:
    assert output_items(X)[0] == (0, X)
    assert [key for key, _ in output_items((X, Z))] == [0, 1]
    assert [key for key, _ in output_items({"x": X})] == ["x"]
    assert [key for key, _ in output_items(Output(X))] == ["logits", "loss"]


@pytest.mark.parametrize("output", [X, (X,), {"x": X}, Output(X), Slots([X]), Opaque(X), [Opaque(X)]])
def test_returned_tensors(output: Any) -> None:
    (found,) = returned_tensors(output)
    assert found is X
