"""A changed teacher is another one, however small the change; a moved or copied one is the same."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_otrt.teacher.cache.fingerprint import fingerprint


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.1), nn.Flatten(), nn.Linear(8, 500))


def flip_last_bit(tensor: torch.Tensor) -> None:
    tensor.data.view(torch.int32).view(-1)[-1] ^= 1


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "last weight": lambda net: flip_last_bit(net[4].weight),
    "running mean": lambda net: flip_last_bit(net[1].running_mean),
    "counter": lambda net: net[1].num_batches_tracked.add_(1),
    "dropout": lambda net: setattr(net[2], "p", 0.2),
    "activation": lambda net: net.append(nn.ReLU()),
    "other activation": lambda net: net.append(nn.Tanh()),
    "stride": lambda net: setattr(net[0], "stride", (2, 2)),
    "type": lambda net: net.double(),
    "swapped weights": lambda net: net[4].weight.data.copy_(net[4].weight.data.flip(0)),
    "fraction": lambda net: setattr(net[3], "scale", 2.0),
    "text": lambda net: setattr(net[3], "pooling", "mean"),
    "tensor that is no buffer": lambda net: setattr(net[3], "mean", torch.ones(3)),
    "its value": lambda net: setattr(net[3], "mean", torch.zeros(3)),
    "whole number": lambda net: setattr(net[3], "heads", 2),
    "private attribute": lambda net: setattr(net[3], "_scale", 2.0),
    "function": lambda net: setattr(net[3], "act", torch.relu),
    "other function": lambda net: setattr(net[3], "act", torch.nn.functional.gelu),
    "code": lambda net: setattr(net[3], "act", lambda x: x + 1),
    "constant in it": lambda net: setattr(net[3], "act", lambda x: x + 2),
    "what it holds": lambda net: setattr(net[3], "act", partial(torch.mul, 2.0)),
    "settings": lambda net: setattr(net[3], "config", {"depth": [1, 2]}),
    "other settings": lambda net: setattr(net[3], "config", {"depth": [1, 3]}),
    "object": lambda net: setattr(net[3], "config", SimpleNamespace(depth=(1, 2))),
    "array": lambda net: setattr(net[3], "table", np.arange(3)),
    "hook": lambda net: net[3].register_forward_hook(lambda module, args, output: 2 * output),
    "hook before": lambda net: net[3].register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "forward": lambda net: setattr(net[3], "forward", lambda x: x.flatten(1) * 3),
    "hidden buffer": lambda net: net.register_buffer("scale", torch.ones(2), persistent=False),
}


def test_each_change_counts() -> None:
    found = {fingerprint(network())}
    for change in CHANGES.values():
        net = network()
        change(net)
        found.add(fingerprint(net))
    assert len(found) == len(CHANGES) + 1


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda net: net.eval(),
        lambda net: net.requires_grad_(False),
        lambda net: net.to(memory_format=torch.channels_last),
        lambda net: net.double().float(),
        torch.compile,
        lambda net: pickle.loads(pickle.dumps(net)),
    ],
)
def test_what_changes_no_output(change: Callable[[nn.Module], nn.Module]) -> None:
    assert fingerprint(change(network())) == fingerprint(network())


def test_settings_count() -> None:
    net = network()
    settings = ({}, {"grid": 4}, {"grid": 2}, {"layers": ("0", "1")}, {"grid": 4, "layers": ()}, {"layers": "4"})
    assert len({fingerprint(net, **each) for each in settings}) == len(settings)
    assert fingerprint(net, a=1, b=2) == fingerprint(net, b=2, a=1)


def test_without_weights() -> None:
    assert fingerprint(nn.ReLU()) != fingerprint(nn.Tanh())


class Scaled(nn.Module):
    def __init__(self, function: Callable[[float], float]) -> None:
        super().__init__()
        self.function = function

    def extra_repr(self) -> str:
        return f"{self.function}"


def test_where_objects_lie_does_not_count() -> None:
    """Each process has its own addresses, which the ``repr`` of some layers shows."""
    assert fingerprint(Scaled(lambda x: x)) == fingerprint(Scaled(lambda x: x))


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_weights_that_are_no_parameters() -> None:
    """Those of frozen script modules are constants of their code, those of quantized layers packed."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(2, 2)).eval() for _ in range(2)]
    frozen = [torch.jit.freeze(torch.jit.script(net)) for net in (*nets, nets[0])]
    assert not list(frozen[0].parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fingerprint(frozen[0]) != fingerprint(frozen[1])
        assert fingerprint(frozen[0]) == fingerprint(frozen[2])
    if "fbgemm" in torch.backends.quantized.supported_engines:
        quantized = [torch.ao.quantization.quantize_dynamic(net) for net in nets]
        assert not list(quantized[0].parameters())
        assert fingerprint(quantized[0]) != fingerprint(quantized[1])
        assert fingerprint(quantized[0]) == fingerprint(copy.deepcopy(quantized[0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_not_count() -> None:
    assert fingerprint(network().cuda()) == fingerprint(network())


def test_weights_that_are_spread_over_processes() -> None:
    """The error names the weight: the user's inputs are not to blame."""
    net = nn.Linear(2, 1)
    net.weight.device_mesh = object()  # as a DTensor has
    with pytest.raises(TypeError, match="^'weight' of the teacher is spread over processes. Let each process have"):
        fingerprint(net)
