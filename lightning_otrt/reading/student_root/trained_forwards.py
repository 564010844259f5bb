"""Which trained modules run with gradient, and so may lie outside of the root or make what enters it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_otrt.layers.names import named_layers, own_parameters
from lightning_otrt.reading.hooks.own_hook import OwnHook
from lightning_otrt.reading.student_root.gradient_reach import leaves_of
from lightning_otrt.reading.torch_internals import add_forward_pre_hook, is_in_backward

__all__ = ["TrainedForwards"]


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
            if id(module) not in seen and any(p.requires_grad for p in own_parameters(module)):
                self._handles.append(add_forward_pre_hook(module, _Note(self, name)))
            seen.add(id(module))

    def outside(self, root: str | None) -> list[str]:
        """Names of those that ran and have trained parameters which ``root`` does not hold; all of them for None."""
        inside = set() if root is None else {id(parameter) for parameter in self._modules[root].parameters()}
        return [
            name
            for name in self._ran
            if any(p.requires_grad and id(p) not in inside for p in own_parameters(self._modules[name]))
        ]

    def that_made(self, tensors: Iterable[Tensor]) -> list[str]:
        """Names of those that ran so far and are trained through these tensors."""
        leaves, _ = leaves_of(tensors)
        return [name for name in self._ran if not leaves.isdisjoint(own_parameters(self._modules[name]))]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def note(self, name: str) -> None:
        """Note that a module runs."""
        if self._is_on() and torch.is_grad_enabled() and not is_in_backward():
            self._ran.setdefault(name)


class _Note(OwnHook):
    """Forward pre-hook that notes its module."""

    def __init__(self, forwards: TrainedForwards, name: str) -> None:
        self.forwards, self.name = forwards, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note the module."""
        self.forwards.note(self.name)
