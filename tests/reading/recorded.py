"""A small student and a recorder on it, for the tests of the recorder and of its hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_otrt.reading.hooks.recorder import RecordedLayer, Recorder
from lightning_otrt.reading.neurons.reader import NeuronReader

KINDS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


class Net(nn.Module):
    """Two layers, the second in place of what the first gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.ReLU(inplace=True)
        self.checkpointed = False
        self.fails = False

    def forward(self, x: Tensor, **others: Any) -> Tensor:
        y = checkpoint(self.first, x, use_reentrant=False) if self.checkpointed else self.first(x)
        if self.fails:
            raise RuntimeError("on purpose")
        return self.second(y)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        return torch.stack([self.net(x) for _ in range(times)]).mean(0)


def reader(name: str) -> NeuronReader:
    return NeuronReader(f"layer {name!r}", neuron_axis=1)


class Started:
    """Notes the forwards that a recorder announces, and answers whether they are recorded."""

    def __init__(self, answer: bool = True) -> None:
        self.answer = answer
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        self.calls.append((name, args, kwargs))
        return self.answer


def watched(net: nn.Module, started: Started | None = None, *, roots: Any = None, layer: str = "first") -> Recorder:
    recorder = Recorder(started or Started())
    recorder.watch_roots(roots or [("", net)])
    module = net.get_submodule(layer.removesuffix(":input"))
    recorder.watch_student({0: RecordedLayer(layer, module, reader(layer))})
    recorder.switch(True)
    return recorder


def handles(module: nn.Module) -> int:
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in KINDS[:2])
