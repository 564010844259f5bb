"""An extra forward changes no plain attribute, and nothing that a hook of a user writes to."""

from __future__ import annotations

import array
import functools
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from lightning_otrt.reading.extra_forwards.evaluation import in_evaluation
from lightning_otrt.reading.extra_forwards.plain_state import PlainState
from lightning_otrt.reading.tracer import trace


class Stateful(nn.Module):
    """Keeps state of every kind in plain attributes, and changes all of it in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.hidden = None
        self.memory = torch.zeros(2, 3)
        self.steps = 0
        self.list, self.queue, self.set = [], deque(maxlen=2), {1}
        self.dict, self.ordered, self.counts = {"a": [torch.ones(1)]}, OrderedDict(b=1, a=2), defaultdict(int)
        self.cache = SimpleNamespace(length=0, keys=[])
        self.gone = "here"
        self.generator = torch.Generator().manual_seed(0)
        self.random = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        self.hidden = x if self.hidden is None else x + self.hidden
        self.memory.add_(1)
        self.steps += 1
        self.list.append(x)
        self.queue.append(x)
        self.set.add(len(self.set) + 1)
        self.dict["a"].append(x)
        self.dict["a"][0].mul_(2)
        self.ordered.move_to_end("b")
        self.counts["x"] += 1
        self.cache.length += 1
        self.cache.keys.append(x)
        self.added = x
        self.__dict__.pop("gone", None)
        torch.rand(1, generator=self.generator)
        self.random.random()
        random.random()
        return x

    def state(self) -> list[object]:
        return [
            *(self.hidden, self.steps, len(self.list), len(self.queue), sorted(self.set), list(self.ordered)),
            *(self.memory.tolist(), [value.tolist() for value in self.dict["a"]], dict(self.counts)),
            *(vars(self.cache), self.gone, hasattr(self, "added"), self.generator.get_state().tolist()),
            *(self.random.getstate(), random.getstate()),
        ]


def test_plain_attributes():
    model = Stateful()
    objects, before = dict(vars(model)), repr(model.state())
    for _ in range(2):
        trace(nn.Sequential(model), (torch.ones(2, 3),))
    assert repr(model.state()) == before
    assert all(vars(model)[name] is value for name, value in objects.items())
    model(torch.ones(2, 3))
    assert (model.steps, len(model.list), model.memory[0, 0]) == (1, 1, 1)


class Collector:
    def __init__(self) -> None:
        self.features: list[Tensor] = []
        self.calls = 0

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.calls += 1
        self.features.append(output)

    def method(self, module: nn.Module, args: object, output: Tensor) -> None:
        self(module, args, output)


everywhere: list[Tensor] = []
calls = 0


def collect_globally(module, args, output):
    global calls
    calls += 1
    everywhere.append(output)


def collect_into(features, module, args, output):
    features["x"].append(output)


def test_what_hooks_of_users_write_to():
    near, counted, by_name, collector, task = [], 0, defaultdict(list), Collector(), nn.Module()
    task.features = []

    def count(module, args, output):
        nonlocal counted
        counted += 1
        task.features.append(output)

    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: near.append(output))
    model[0].register_forward_pre_hook(lambda module, args: near.append(args[0]))
    for hook in (count, collector, collector.method, collect_globally, functools.partial(collect_into, by_name)):
        model[1].register_forward_hook(hook)
    trace(model, (torch.ones(2, 3),))
    assert (near, counted, dict(by_name), collector.features, collector.calls) == ([], 0, {}, [], 0)
    assert (task.features, everywhere, calls) == ([], [], 0)
    model(torch.ones(2, 3))
    assert (len(near), counted, len(by_name["x"]), len(collector.features), collector.calls) == (2, 1, 1, 2, 2)
    assert (len(task.features), len(everywhere), calls) == (1, 1, 1)
    assert near[1].requires_grad


def test_weights_that_are_cached_keep_their_gradient():
    """Inside ``parametrize.cached()`` the weights of the trace would be those of the training step."""
    model = nn.Sequential(weight_norm(nn.Linear(3, 3)))
    model[0].bias.requires_grad_(False)
    x = torch.ones(2, 3)
    with parametrize.cached():
        trace(model, (x,))
        model(x).sum().backward()
        with in_evaluation(model):
            assert not model[0].weight.requires_grad
        assert model[0].weight.requires_grad
    assert all(weight.grad is not None for weight in model[0].parametrizations.weight.parameters())


def test_restored_where_the_forward_fails():
    model = Stateful()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trace(nn.Sequential(model, nn.Linear(5, 5)), (torch.ones(2, 3),))
    assert (model.steps, model.hidden) == (0, None)


def test_hidden_modules_and_inference_tensors_are_left_alone():
    model, hidden = nn.Linear(2, 2), nn.Linear(2, 2)
    model.others = [hidden]
    with torch.inference_mode():
        model.bank = torch.ones(2)
    state = PlainState([model])
    with torch.no_grad():
        hidden.weight.add_(1)
    before = hidden.weight.clone()
    state.restore()
    assert torch.equal(hidden.weight, before)


def test_the_queue_keeps_its_length():
    model = nn.Linear(2, 2)
    model.queue = deque([1, 2], maxlen=2)
    state = PlainState([model])
    model.queue.append(3)
    state.restore()
    assert (list(model.queue), model.queue.maxlen) == ([1, 2], 2)


def test_hooks_that_a_forward_registers():
    """As networks of Hugging Face do to collect hidden states: an attribute tells them that it is done."""

    class Collecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.found, self.is_hooked = nn.Linear(3, 3), [], False

        def forward(self, x: Tensor) -> list[Tensor]:
            self.found = []
            if not self.is_hooked:
                self.layer.register_forward_hook(lambda module, args, output: self.found.append(output))
                self.is_hooked = True
            self.layer(x)
            return self.found

    model = Collecting()
    trace(model, (torch.ones(2, 3),))
    assert (model.is_hooked, len(model.layer._forward_hooks)) == (False, 0)
    assert [len(model(torch.ones(2, 3))) for _ in range(2)] == [1, 1]
    trace(model, (torch.ones(2, 3),))
    assert (len(model.layer._forward_hooks), len(model(torch.ones(2, 3)))) == (1, 1)


class Slotted:
    __slots__ = ("count", "history")

    def __init__(self) -> None:
        self.count, self.history = 0, [0]


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (np.zeros(3), lambda value: value.__iadd__(1)),
        (np.zeros((2, 2), dtype=object), lambda value: value.fill(1)),
        (bytearray(b"abc"), lambda value: value.extend(b"d")),
        (array.array("i", [1, 2]), lambda value: value.append(3)),
        (Slotted(), lambda value: (setattr(value, "count", 5), value.history.append(1))),
    ],
    ids=["array", "array of objects", "bytearray", "array of the standard library", "slots"],
)
def test_values_that_are_written_to_in_place(value: Any, change: Callable[[Any], object]) -> None:
    def shown() -> object:
        if isinstance(value, Slotted):
            return value.count, list(value.history)
        return list(value) if not isinstance(value, np.ndarray) else value.tolist()

    net = nn.Linear(2, 2)
    net.kept, before = value, shown()
    state = PlainState([net])
    change(value)
    assert shown() != before
    state.restore()
    assert net.kept is value
    assert shown() == before


@pytest.mark.parametrize(
    "generator",
    [
        torch.Generator().manual_seed(0),
        random.Random(0),
        np.random.default_rng(0),
        np.random.RandomState(0),
        np.random.PCG64(0),
    ],
    ids=lambda generator: type(generator).__name__,
)
def test_generators_of_a_module(generator: Any) -> None:
    def drawn() -> float:
        if isinstance(generator, torch.Generator):
            return float(torch.rand((), generator=generator))
        return generator.random_raw() if isinstance(generator, np.random.BitGenerator) else float(generator.random())

    net = nn.Linear(2, 2)
    net.generator = generator
    state = PlainState([net])
    assert state.generators == [generator]
    first, _ = drawn(), drawn()
    state.restore()
    assert drawn() == first
