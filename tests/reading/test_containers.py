"""Walks over nested inputs and outputs: what each looks into, as the table in ``containers.py`` says."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_otrt.reading.containers import all_tensors, map_inputs, tensors_in

X, Z = torch.randn(4, 6), torch.randn(4, 3)


class Opaque:
    def __init__(self, value: Any) -> None:
        self.value = value


class OpaqueSlots:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass
class Data:
    value: Any


@dataclass(frozen=True)
class Frozen:
    value: Any


class Named(NamedTuple):
    first: Any
    second: Any


@dataclass(slots=True)
class DataSlots:
    value: Any


def is_found(tensors: list[Tensor]) -> bool:
    return [tensor is X for tensor in tensors] == [True]


#: A value that holds X, and which of the walks find it: `all_tensors`, `tensors_in`, `map_inputs`.
VALUES: list[tuple[Any, tuple[bool, bool, bool]]] = [
    (X, (True, True, True)),
    ({"x": [(X, None), "text"]}, (True, True, True)),
    (Data(X), (True, True, True)),
    (Frozen([X]), (True, True, True)),
    ([{"x": Frozen([Frozen(X)])}], (True, True, True)),
    (Data(Frozen(X)), (True, True, True)),
    (DataSlots(X), (True, False, True)),
    (SimpleNamespace(value=X), (True, True, False)),
    (Opaque(X), (False, True, False)),
    (OpaqueSlots(X), (False, False, False)),
    ("text", (False, False, False)),
]


@pytest.mark.parametrize(("value", "finds"), VALUES)
def test_what_is_looked_into(value: Any, finds: tuple[bool, bool, bool]) -> None:
    mapped: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        mapped.append(tensor)
        return tensor

    map_inputs(((), {"value": value}), note)
    assert (is_found(list(all_tensors(value))), is_found(list(tensors_in(value))), is_found(mapped)) == finds


def test_order_and_repetition() -> None:
    value = ({"x": [X, None]}, (Z,), X)
    assert [tensor is expected for tensor, expected in zip(all_tensors(value), (X, Z, X), strict=True)] == [True] * 3
    assert [tensor is expected for tensor, expected in zip(tensors_in(value), (X, Z), strict=True)] == [True] * 2


def test_an_object_that_holds_itself() -> None:
    value = Opaque([X])
    value.value.append(value)
    assert is_found(list(tensors_in(value)))


def test_mapped_inputs_are_in_containers_of_their_own() -> None:
    inner = {"x": [X]}
    frozen = Frozen(inner)
    (found,), kwargs = map_inputs(((inner,), {"frozen": frozen, "named": Named(frozen, X)}), torch.neg)
    assert torch.equal(found["x"][0], -X)
    assert torch.equal(kwargs["frozen"].value["x"][0], -X)
    assert type(kwargs["named"]) is Named
    assert torch.equal(kwargs["named"].first.value["x"][0], -X)
    assert torch.equal(kwargs["named"].second, -X)
    assert inner["x"][0] is X
    assert frozen.value is inner
