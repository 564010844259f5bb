"""How much of a student the term reaches, and which trained modules run outside of the root that was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_otrt.layers.names import is_inside, named_layers, primary_names
from lightning_otrt.layers.pairs import INPUT, LayerPair
from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.torch_internals import add_forward_pre_hook, is_in_backward

__all__ = ["TrainedForwards", "describe_reach", "leads_to"]


def describe_reach(student: nn.Module, trace: Trace, pairs: Sequence[LayerPair]) -> str:
    """The root, and how many of the student's trained tensors lie before the recorded layers.

    Args:
        student: The student.
        trace: Its traced forward.
        pairs: The resolved pairs.

    Example:
        >>> from lightning_otrt.reading.tracer import trace
        >>> net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
        >>> describe_reach(net, trace(net, (torch.zeros(3, 4),)), [LayerPair("1", "1")])
        'root: the whole student; 2 of 4 trained tensors lie before the recorded layers'
    """
    modules = named_layers(student)
    names = primary_names(modules, trace.root)
    trained: dict[int, bool] = {}
    # The modules by name, since a wrapper has no name of its own.
    for module in modules.values():
        is_before = any(leads_to(names[id(module)], pair.student, trace) for pair in pairs)
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                trained[id(parameter)] = trained.get(id(parameter), False) or is_before
    root = repr(trace.root) if trace.root else "the whole student"
    return f"root: {root}; {sum(trained.values())} of {len(trained)} trained tensors lie before the recorded layers"


def leads_to(name: str, layer: str, trace: Trace) -> bool:
    """Whether a module ran before a recorded layer, is part of it or holds it."""
    recorded, found = trace.layer(layer), trace.layer(name)
    if found.order is None or not is_inside(name, trace.root):
        return False
    if is_inside(recorded.name, name) and recorded.name != name:
        return True
    is_part = is_inside(name, recorded.name)
    if layer.endswith(INPUT):
        return not is_part and found.order < (recorded.order or 0)
    return is_part or found.order < (recorded.order or 0)


class TrainedForwards:
    """Notes which modules with trained parameters run with gradient, until :meth:`remove`.

    Args:
        student: The student.
        is_on: Whether forwards count now.
    """

    def __init__(self, student: nn.Module, is_on: Callable[[], bool]) -> None:
        self._is_on = is_on
        self._modules = named_layers(student)
        self._ran: dict[str, None] = {}
        self._handles: list[RemovableHandle] = []
        seen: set[int] = set()
        for name, module in self._modules.items():
            if id(module) not in seen and any(p.requires_grad for p in module.parameters(recurse=False)):
                self._handles.append(add_forward_pre_hook(module, partial(self._note, name)))
            seen.add(id(module))

    def outside(self, root: str) -> list[str]:
        """Names of those that ran and have trained parameters which ``root`` does not hold."""
        inside = {id(parameter) for parameter in self._modules[root].parameters()}
        return [
            name
            for name in self._ran
            if any(p.requires_grad and id(p) not in inside for p in self._modules[name].parameters(recurse=False))
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._is_on() and torch.is_grad_enabled() and not is_in_backward():
            self._ran.setdefault(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainedForwards:
        """The same object: a copy that is made during the first step is not watched."""
        return self
