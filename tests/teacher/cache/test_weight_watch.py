"""Whatever an owner does to the weights of a teacher is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_otrt.teacher.cache.weight_watch import WeightWatch


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5, dtype=torch.bfloat16))
    return net.to(memory_format=torch.channels_last)


def changed(watch: WeightWatch) -> str:
    return watch.changed(watch.look())


@torch.no_grad()
def average(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.lerp_(torch.randn_like(parameter), 0.1)


def average_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data.mul_(0.9).add_(torch.randn_like(parameter), alpha=0.1)


CHANGES: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "a moving average": (average, "0.weight"),
    "one that writes to data": (average_data, "0.weight"),
    "a step of an optimizer": (lambda net: net[1].weight.data.sub_(0.1), "1.weight"),
    "other data": (lambda net: setattr(net[0].bias, "data", net[0].bias.data.clone()), "0.bias"),
    "another parameter": (lambda net: setattr(net[0], "bias", nn.Parameter(net[0].bias.clone())), "0.bias"),
    "another table of parameters": (
        lambda net: setattr(net[0], "_parameters", {**net[0]._parameters, "bias": nn.Parameter(torch.ones(8))}),
        "0.bias",
    ),
    "loaded weights": (lambda net: net.load_state_dict(network().state_dict()), "0.weight"),
    "assigned weights": (lambda net: net.load_state_dict(network().state_dict(), assign=True), "0.weight"),
    "a counter": (lambda net: net[1].num_batches_tracked.add_(1), "1.num_batches_tracked"),
    "statistics": (lambda net: net[1].running_mean.data.add_(1), "1.running_mean"),
    "another type": (lambda net: net.double(), "0.weight"),
    "another layer": (lambda net: net.append(nn.Linear(2, 2)), "3.bias"),
    "one less": (lambda net: net[0].register_parameter("bias", None), "0.bias"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_notices(change: str) -> None:
    net = network()
    watch = WeightWatch(net)
    assert [changed(watch) for _ in range(3)] == ["", "", ""]
    act, name = CHANGES[change]
    act(net)
    assert changed(watch) == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("place", [0, 17, -1])
def test_a_look_at_everything_sees_each_number(dtype: torch.dtype, place: int) -> None:
    """A short look sees one number of each tensor."""
    net = nn.Linear(5, 7).to(dtype)
    watch = WeightWatch(net)
    assert watch.changed(watch.look(everything=True)) == ""
    net.weight.data.view(-1)[place] *= 1.01
    assert watch.changed(watch.look()) == ("weight" if place == 17 else "")
    assert watch.changed(watch.look(everything=True)) == "weight"


def test_leaves_forwards_alone() -> None:
    net = network()[:2].eval()
    watch = WeightWatch(net)
    net(torch.randn(2, 3, 4, 4)).sum().backward()
    assert changed(watch) == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_are_values(value: float) -> None:
    net = nn.Linear(2, 2)
    net.weight.data.fill_(value)
    watch = WeightWatch(net)
    assert changed(watch) == ""
    net.weight.data.fill_(1.0)
    assert changed(watch) == "weight"


def test_without_weights_and_with_odd_ones() -> None:
    assert changed(WeightWatch(nn.ReLU())) == ""
    net = nn.Module()
    net.register_buffer("nothing", torch.empty(0, 3))
    net.register_buffer("flag", torch.tensor(True))
    net.register_buffer("phase", torch.ones(3, dtype=torch.complex64))
    with torch.inference_mode():
        net.register_buffer("made", torch.ones(3))
    watch = WeightWatch(net)
    assert changed(watch) == ""
    net.phase.data += 1j
    assert changed(watch) == "phase"
