"""Which module makes the logits of the student, in evaluation mode and in training."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.names import is_inside, named_layers
from lightning_otrt.layers.trace import Trace, TracedTensor
from lightning_otrt.reading.torch_internals import add_forward_hook
from lightning_otrt.reading.traced.module_types import role_of

__all__ = ["LogitMakers"]


class LogitMakers:
    """Notes which modules returned the logits in the trace, and which do in the training forward after it.

    Args:
        student: The student.
        trace: Its trace, in evaluation mode.
        logits: The logits in the trace.
    """

    def __init__(self, student: nn.Module, trace: Trace, logits: TracedTensor) -> None:
        self._in_evaluation = [
            layer.name
            for layer in trace.layers
            if layer.gives_model_output and layer.output is not None and layer.output.shape == logits.shape
            if layer.name != trace.root
        ]
        self._made: list[tuple[str, weakref.ref[Tensor]]] = []
        self._handles: list[Any] = []
        seen: set[int] = set()
        for name, module in named_layers(student).items():
            # A dropout may be left out in evaluation, where it changes nothing.
            is_noise = role_of(module) == "dropout"
            if name != trace.root and is_inside(name, trace.root) and id(module) not in seen and not is_noise:
                self._handles.append(add_forward_hook(module, self._note(name)))
            seen.add(id(module))

    def _note(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not torch.compiler.is_compiling():
                self._made.append((name, weakref.ref(output)))

        return hook

    def remove(self) -> None:
        """Remove the hooks, and forget what they noted."""
        for handle in self._handles:
            handle.remove()
        self._made, self._handles = [], []

    def take_difference(self, logits: Tensor) -> str:
        """Remove the hooks, and say how the logits of this forward are made otherwise.

        Args:
            logits: What the student returned in training.

        Returns:
            ``""`` if the same module makes them, or none does in training.
        """
        made = self._made
        self.remove()
        in_training = [name for name, output in made if output() is logits]
        # Code makes them in training alone where it adds noise to them, as a functional dropout does.
        if not in_training or set(in_training) & set(self._in_evaluation):
            return ""
        return f"what {in_training[-1]!r} returns in training, and {_described(self._in_evaluation)} in evaluation mode"


def _described(names: list[str]) -> str:
    return f"what {names[-1]!r} returns" if names else "computed from what modules return"
