"""A change of what a teacher computes is seen; what its own forward changes is not one."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt.teacher.cache.fingerprint import fingerprint
from lightning_otrt.teacher.frozen.plain_watch import PlainWatch


class Net(nn.Module):
    """Counts its forwards, and collects what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.heads, self.act, self.settings = 2, torch.relu, {"depth": [1, 2]}
        self.calls, self.seen = 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(float(x.sum()))
        self.newest = x
        return self.act(self.inner(x))


CHANGES: dict[str, Callable[[Net], object]] = {
    "number": lambda net: setattr(net, "heads", 3),
    "function": lambda net: setattr(net, "act", torch.tanh),
    "child": lambda net: setattr(net, "inner", nn.Sequential(nn.Linear(2, 2))),
    "new attribute": lambda net: setattr(net, "scale", 1.0),
    "no attribute": lambda net: delattr(net, "heads"),
    "hook": lambda net: net.inner.register_forward_hook(lambda module, args, output: 2 * output),
    "forward": lambda net: setattr(net.inner, "forward", lambda x: x),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name: str) -> None:
    net = Net()
    watch = PlainWatch(net)
    with watch.learning():
        net(torch.ones(1, 2))
    before = fingerprint(net, watch.changing)
    assert not watch.changed()
    CHANGES[name](net)
    assert watch.changed()
    assert fingerprint(net, watch.changing) != before
    assert not watch.changed()


def test_in_place_is_seen_in_a_longer_look() -> None:
    net = Net()
    watch = PlainWatch(net)
    net.settings["depth"].append(3)
    assert not watch.changed()
    assert watch.changed(everything=True)


AGAIN: dict[str, Callable[[Net, int], object]] = {
    "numbers": lambda net, step: [setattr(net, "heads", 1000.5 + step + part / 2) for part in range(2)],
    "objects": lambda net, step: [setattr(net, "settings", value) for value in (None, Settings(step))],
    "functions": lambda net, step: [setattr(net, "act", value) for value in (None, lambda x: x * step)],
}


class Settings:
    def __init__(self, depth: int) -> None:
        self.depth = depth


@pytest.mark.parametrize("name", AGAIN)
def test_what_gets_the_address_of_what_was_there(name: str) -> None:
    """An object that is set twice between two looks often has the address of the first one."""
    net = Net()
    AGAIN[name](net, 0)
    watch = PlainWatch(net)
    for step in range(1, 20):
        AGAIN[name](net, step)
        assert watch.changed()


def test_a_hook_that_is_put_on_again() -> None:
    net = Net()
    handle = net.register_forward_hook(lambda module, args, output: output + 0)
    watch = PlainWatch(net)
    for step in range(1, 20):
        handle.remove()
        handle = net.register_forward_hook(eval(f"lambda module, args, output: output + {step}"))
        assert watch.changed()


@pytest.mark.parametrize("everything", [False, True])
def test_what_a_forward_changes(everything: bool) -> None:
    """Learned from one that is undone, as the trace is, so that facts are the same whatever ran before."""
    fresh = Net()
    used = copy.deepcopy(fresh)
    for _ in range(3):
        used(torch.ones(1, 2))
    found = []
    for net in (fresh, used):
        watch = PlainWatch(net)
        with watch.learning():
            net(torch.ones(1, 2))
        found.append(fingerprint(net, watch.changing))
        net(torch.ones(1, 2))
        assert not watch.changed(everything=everything)
    assert found[0] == found[1]


def test_what_a_later_forward_changes() -> None:
    net = Net()
    watch = PlainWatch(net)
    net(torch.ones(1, 2))
    assert watch.learn(everything=True)
    net(torch.ones(1, 2))
    assert not watch.learn(everything=True)
    assert not watch.changed(everything=True)


def test_no_activation_is_held() -> None:
    net = Net()
    watch = PlainWatch(net)
    with watch.learning():
        net(torch.ones(1, 2))
    newest = torch.ones(1, 2)
    net(newest)
    watch.changed()
    reference = weakref.ref(newest)
    del newest
    net(torch.ones(1, 2))
    assert reference() is None
