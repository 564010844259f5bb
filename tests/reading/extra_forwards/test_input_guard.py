"""Extra forwards leave the student's batch as it is."""

from __future__ import annotations

from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightning_otrt.reading.extra_forwards.input_guard import InputGuard

Point = namedtuple("Point", ["x", "y"])


@dataclass
class Graph:
    nodes: Tensor
    extra: dict[str, Tensor]


class Store:
    """A data object as PyTorch Geometric has them: attributes in a dictionary of its own, which a copy copies."""

    def __init__(self, **values: Tensor) -> None:
        self.__dict__["store"] = dict(values)

    def __copy__(self) -> Store:
        return Store(**self.store)

    def __setattr__(self, name: str, value: Tensor) -> None:
        self.store[name] = value


class Cache:
    """A cache as Hugging Face has them: layers in a list, tensors in the attributes of these."""

    def __init__(self) -> None:
        self.layers = [SimpleNamespace(keys=value())]
        self.queue, self.itself = deque([[1]]), self


class Nested:
    """A graph as PyTorch Geometric has them: attributes in a dictionary, which a plain copy shares."""

    def __init__(self, **values: Tensor) -> None:
        self.__dict__["store"] = dict(values)

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__["store"][name]

    def __setattr__(self, name: str, value: Tensor) -> None:
        self.store[name] = value


class Slots:
    __slots__ = ("inner",)

    def __init__(self) -> None:
        self.inner = {"x": value()}


def lengthen(batch):
    batch.layers[0].keys = torch.cat([batch.layers[0].keys] * 2)
    batch.layers.append(SimpleNamespace())
    batch.itself.queue[0].append(1)


def value() -> Tensor:
    return torch.arange(4.0)


def pop(batch):
    batch.pop("x")


def fill(batch):
    batch.hidden = torch.zeros(1)


@pytest.mark.parametrize(
    ("make", "change", "look"),
    [
        (lambda: {"x": value()}, pop, lambda batch: list(batch)),
        (lambda: OrderedDict(x=value()), pop, lambda batch: list(batch)),
        (lambda: UserDict(x=value()), pop, lambda batch: list(batch)),
        (lambda: [value(), value()], lambda batch: batch.clear(), len),
        (lambda: {"a": {"x": value()}}, lambda batch: batch["a"].clear(), lambda batch: list(batch["a"])),
        (lambda: Graph(value(), {}), lambda batch: batch.extra.update(y=value()), lambda batch: len(batch.extra)),
        (lambda: SimpleNamespace(x=value()), fill, lambda batch: sorted(vars(batch))),
        (lambda: Store(x=value()), fill, lambda batch: sorted(batch.store)),
        (Cache, lengthen, lambda batch: [len(batch.layers), batch.queue[0], len(batch.layers[0].keys)]),
        (lambda: {"cache": [Cache()]}, lambda b: lengthen(b["cache"][0]), lambda b: len(b["cache"][0].layers)),
        (lambda: Nested(x=value()), fill, lambda batch: sorted(batch.store)),
        (lambda: SimpleNamespace(a=SimpleNamespace(x=[])), lambda b: b.a.x.append(1), lambda b: len(b.a.x)),
        (Slots, lambda batch: batch.inner.clear(), lambda batch: len(batch.inner)),
        (lambda: ({"x": value()},), lambda batch: batch[0].clear(), lambda batch: list(batch[0])),
        (lambda: Point({"x": value()}, 1), lambda batch: batch.x.clear(), lambda batch: list(batch.x)),
    ],
)
def test_containers_are_copied(make, change, look):
    batch = make()
    before = look(batch)
    own = InputGuard().copied(batch)
    assert type(own) is type(batch)
    change(own)
    assert look(batch) == before


def test_tensors_are_shared_until_one_is_written_to():
    guard, x = InputGuard(), value()
    assert guard.copied((x, {"x": x}))[0] is x
    with guard.first_forward((x,)) as (own,):
        assert own is x
    assert not guard.clones


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x,),
        lambda x: {"x": [x]},
        lambda x: Graph(x, {}),
        lambda x: MappingProxyType({"x": x}),
        lambda x: SimpleNamespace(x=x),
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_written_tensors_are_restored_and_cloned_from_then_on(wrap, requires_grad):
    guard, x = InputGuard(), value().requires_grad_(requires_grad)
    inputs = wrap(x)
    told = pytest.warns(UserWarning, match=r"writes to its inputs in place \(shapes: \(4,\)\)")
    with told, guard.first_forward(inputs), torch.no_grad():
        x.detach().mul_(2)
    assert torch.equal(x, value())
    assert guard.clones
    assert guard.copied((x,))[0] is not x


def test_restored_where_the_forward_fails():
    guard, x = InputGuard(), value()

    def fail() -> None:
        with guard.first_forward((x,)):
            x.mul_(2)
            raise RuntimeError("later")

    with pytest.warns(UserWarning, match="in place"), pytest.raises(RuntimeError, match="later"):
        fail()
    assert torch.equal(x, value())


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        x = value()
    with InputGuard().first_forward((x,)) as (own,):
        assert own is x


def test_copies_keep_what_is_the_same_object():
    guard, x = InputGuard(), value()
    shared = [x]
    guard.clones = True
    first, second, cache = guard.copied((shared, {"x": shared}, Cache()))
    assert first is second["x"]
    assert first is not shared
    assert torch.equal(first[0], x)
    assert first[0] is not x
    assert cache.itself is cache
