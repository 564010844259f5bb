"""How much of the gradient at the recorded layers comes from the task, and how much from the transfer term."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import INPUT, LayerPair
from lightning_otrt.reading.outputs import select_tensor
from lightning_otrt.reading.torch_internals import add_forward_hook, add_forward_pre_hook
from lightning_otrt.reading.views import View

__all__ = ["GradientProbe"]


class GradientProbe:
    """Splits the gradient of a loss at the recorded student layers into the part of the task and that of the term.

    For each output of a layer it stores a position in the autograd graph, not the activation.

    Args:
        student: The student.
        pairs: The resolved pairs; :attr:`names` are their student layers, each once.
    """

    def __init__(self, student: nn.Module, pairs: Sequence[LayerPair]) -> None:
        modules = named_layers(student)
        layers = {pair.student: pair for pair in pairs}
        self.names = tuple(layers)
        self._layers = [pair.student for pair in pairs]
        self._edges: dict[str, list[GradientEdge]] = {name: [] for name in layers}
        self._active = False
        self._handles: list[RemovableHandle] = []
        for name, pair in layers.items():
            module = modules[name.removesuffix(INPUT)]
            if name.endswith(INPUT):
                handle = add_forward_pre_hook(module, self._on_input(name), with_kwargs=True)
            else:
                handle = add_forward_hook(module, self._on_output(name, pair.select))
            self._handles.append(handle)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the forwards inside the block; forwards of earlier blocks are forgotten."""
        self._edges = {name: [] for name in self.names}
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def has_outputs(self, views: Sequence[View]) -> bool:
        """Whether every layer that ran in these views was recorded here.

        False for code compiled before, which does not call hooks added later.
        """
        ran = {self._layers[int(key)] for view in views for key in view.student}
        return bool(ran) and all(self._edges[name] for name in ran)

    def split(self, loss: Tensor, views: Sequence[View]) -> tuple[Tensor, Tensor]:
        """Norms of both parts of the gradient of ``loss`` at each of :attr:`names`; the graph is kept.

        Args:
            loss: Any multiple of the task's loss plus the term.
            views: The forwards that the term was computed from.

        Returns:
            Norms ``(layers,)`` for the task and for the term, in float32.
        """
        readings = [
            reading for view in views for calls in view.student.values() for reading in calls if reading.requires_grad
        ]
        edges = [edge for name in self.names for edge in self._edges[name]]
        inputs: list[Any] = [*readings, *edges]
        both = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        # Only the term depends on the readings, so the gradient that flows back from them is that of the term.
        used = [(reading, grad) for reading, grad in zip(readings, both, strict=False) if grad is not None]
        term: Sequence[Tensor | None] = [None] * len(edges)
        if used:
            outputs, grads = zip(*used, strict=True)
            term = torch.autograd.grad(outputs, edges, grads, retain_graph=True, allow_unused=True)
        squares = torch.zeros(2, len(self.names), device=loss.device)
        layers = [index for index, name in enumerate(self.names) for _ in self._edges[name]]
        for layer, total, own in zip(layers, both[len(readings) :], term, strict=True):
            if total is None:
                continue
            own = torch.zeros_like(total) if own is None else own.float()
            squares[0, layer] += (total.float() - own).square().sum()
            squares[1, layer] += own.square().sum()
        norms = squares.sqrt()
        return norms[0], norms[1]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._edges = {name: [] for name in self.names}

    def _on_input(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            self._record(name, value)

        return hook

    def _on_output(self, name: str, select: str | int | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._active:
                self._record(name, select_tensor(output, select, where=name))

        return hook

    def _record(self, name: str, value: Tensor | None) -> None:
        if self._active and value is not None and value.requires_grad:
            # The edge, not the tensor: an in-place operation after the layer would move the tensor in the graph.
            self._edges[name].append(get_gradient_edge(value))
