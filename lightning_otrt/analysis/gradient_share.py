"""How much of the gradient at the recorded layers comes from the task, and how much from each term of the transfer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import INPUT, LayerPair
from lightning_otrt.reading.hooks.own_hook import FunctionHook
from lightning_otrt.reading.hooks.views import View
from lightning_otrt.reading.neurons.outputs import select_tensor
from lightning_otrt.reading.torch_internals import add_forward_hook, add_forward_pre_hook
from lightning_otrt.reading.traced.arguments import entered_tensor

__all__ = ["GradientNorms", "GradientProbe"]


class GradientNorms(NamedTuple):
    """Norms ``(layers,)`` of the parts of a gradient, in float32.

    Attributes:
        task: That of the loss of the task.
        transport: That of the transport term.
        distillation: That of the distillation of logits.
    """

    task: Tensor
    transport: Tensor
    distillation: Tensor


class GradientProbe:
    """Splits the gradient of a loss at the recorded student layers into the parts of the task and of both terms.

    For each output of a layer it stores a position in the autograd graph, not the activation.

    Args:
        student: The student.
        pairs: The resolved pairs; :attr:`names` are their student layers, each once, or once for each ``select`` where
            pairs take several of its outputs.
    """

    def __init__(self, student: nn.Module, pairs: Sequence[LayerPair]) -> None:
        modules = named_layers(student)
        self._layers = _names_of(pairs)
        layers = dict(zip(self._layers, pairs, strict=True))
        self.names = tuple(layers)
        self._edges: dict[str, list[GradientEdge]] = {name: [] for name in layers}
        #: The layers that ran with gradient, also those that nothing trains, which have no edge.
        self._called: set[str] = set()
        self._active = False
        self._handles: list[RemovableHandle] = []
        for name, pair in layers.items():
            module = modules[pair.student.removesuffix(INPUT)]
            if pair.student.endswith(INPUT):
                handle = add_forward_pre_hook(module, FunctionHook(self._on_input(name)), with_kwargs=True)
            else:
                handle = add_forward_hook(module, FunctionHook(self._on_output(name, pair.select)))
            self._handles.append(handle)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the forwards inside the block; forwards of earlier blocks are forgotten."""
        self._edges = {name: [] for name in self.names}
        self._called.clear()
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def has_outputs(self, views: Sequence[View]) -> bool:
        """Whether every layer that ran in these views was recorded here.

        False for code compiled before, which does not call hooks added later.
        """
        ran = {self._layers[index] for view in views for index in view.student}
        # Where only logits are distilled no layer is read.
        return ran <= self._called if ran else any(self._edges.values())

    def split(self, loss: Tensor, views: Sequence[View]) -> GradientNorms:
        """Norms of the parts of the gradient of ``loss`` at each of :attr:`names`; the graph is kept.

        Args:
            loss: Any multiple of the task's loss plus the terms.
            views: The forwards that the terms were computed from.
        """
        readings, distilled = _recorded(views)
        edges = [edge for name in self.names for edge in self._edges[name]]
        inputs: list[Any] = [*readings, *distilled, *edges]
        found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        count = len(readings) + len(distilled)
        # Only the terms depend on what was recorded, so the gradient that flows back from there is that of the terms.
        transport = _flowing_back(readings, found, edges)
        logits = _flowing_back(distilled, found[len(readings) :], edges)
        squares = torch.zeros(3, len(self.names), device=loss.device)
        layers = [index for index, name in enumerate(self.names) for _ in self._edges[name]]
        for layer, total, *own in zip(layers, found[count:], transport, logits, strict=True):
            if total is None:
                continue
            parts = [torch.zeros_like(total) if part is None else part.float() for part in own]
            for row, part in enumerate([total.float() - parts[0] - parts[1], *parts]):
                squares[row, layer] += part.square().sum()
        return GradientNorms(*squares.sqrt())

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._edges = {name: [] for name in self.names}
        self._called.clear()

    def _on_input(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._record(name, entered_tensor(args, kwargs))

        return hook

    def _on_output(self, name: str, select: str | int | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._active:
                self._record(name, select_tensor(output, select, where=name))

        return hook

    def _record(self, name: str, value: Tensor | None) -> None:
        if not self._active:
            return
        if torch.is_grad_enabled():
            self._called.add(name)
        if value is not None and value.requires_grad:
            # The edge, not the tensor: an in-place operation after the layer would move the tensor in the graph.
            self._edges[name].append(get_gradient_edge(value))


def _names_of(pairs: Sequence[LayerPair]) -> list[str]:
    """The student layer of each pair, with the selected output where pairs take several of them."""
    selects: dict[str, set[str | int | None]] = {}
    for pair in pairs:
        selects.setdefault(pair.student, set()).add(pair.select)
    return [pair.student if len(selects[pair.student]) == 1 else f"{pair.student}-{pair.select}" for pair in pairs]


def _recorded(views: Sequence[View]) -> tuple[list[Tensor], list[Tensor]]:
    """What the transport and what the distillation of the views depends on."""
    pairs: list[Tensor] = []
    distilled: list[Tensor] = []
    for view in views:
        pairs.extend(chain.from_iterable(view.student.values()))
        distilled.extend(view.features)
        if view.logits is not None:
            distilled.append(view.logits)
    readings, logits = ([tensor for tensor in found if tensor.requires_grad] for found in (pairs, distilled))
    return readings, logits


def _flowing_back(
    recorded: Sequence[Tensor], gradients: Sequence[Tensor | None], edges: Sequence[Any]
) -> Sequence[Tensor | None]:
    """What the gradients of recorded tensors are at the edges."""
    used = [(tensor, grad) for tensor, grad in zip(recorded, gradients, strict=False) if grad is not None]
    if not used or not edges:
        return [None] * len(edges)
    outputs, grads = zip(*used, strict=True)
    return torch.autograd.grad(outputs, edges, grads, retain_graph=True, allow_unused=True)
