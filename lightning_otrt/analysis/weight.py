"""How strong the transfer term is beside the task at the recorded layers, and the weight for a given ratio."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from lightning_otrt.checks import check_count, check_module
from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import INPUT, LayerPair
from lightning_otrt.reading.evaluation import state_restored
from lightning_otrt.reading.outputs import select_tensor
from lightning_otrt.reading.views import View
from lightning_otrt.transfer import RepresentationTransfer

__all__ = ["GradientProbe", "WeightSuggestion", "suggest_weight"]


class GradientProbe:
    """Splits the gradient of a loss at the recorded student layers into that of the task and that of the transfer term.

    It notes where in the autograd graph the outputs of the layers are, and keeps no activation.

    Args:
        student: The student.
        pairs: The resolved pairs; :attr:`names` are their student layers, each once.
    """

    def __init__(self, student: nn.Module, pairs: Sequence[LayerPair]) -> None:
        modules = named_layers(student)
        layers = {pair.student: pair for pair in pairs}
        self.names = tuple(layers)
        self._edges: dict[str, list[GradientEdge]] = {name: [] for name in layers}
        self._active = False
        self._handles: list[RemovableHandle] = []
        for name, pair in layers.items():
            module = modules[name.removesuffix(INPUT)]
            if name.endswith(INPUT):
                handle = module.register_forward_pre_hook(self._on_input(name), with_kwargs=True)
            else:
                handle = module.register_forward_hook(self._on_output(name, pair.select))
            self._handles.append(handle)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the outputs of the forwards inside the block, and forget those of earlier ones."""
        self._edges = {name: [] for name in self.names}
        self._active = True
        try:
            yield
        finally:
            self._active = False

    @property
    def has_outputs(self) -> bool:
        """Whether the outputs of all layers were seen: code that was compiled before calls no new hook."""
        return bool(self.names) and all(self._edges.values())

    def split(self, loss: Tensor, views: Sequence[View]) -> tuple[Tensor, Tensor]:
        """Norms of both parts of the gradient of ``loss``, at each of :attr:`names`; the graph is kept.

        Args:
            loss: Any multiple of the task's loss plus the term.
            views: The forwards behind the term.

        Returns:
            Norms ``(layers,)`` for the task, and for the term, in float32.
        """
        readings = [
            reading for view in views for calls in view.student.values() for reading in calls if reading.requires_grad
        ]
        edges = [edge for name in self.names for edge in self._edges[name]]
        inputs: list[Any] = [*readings, *edges]
        both = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        # The term alone depends on the readings, and on nothing else: what flows back from them is its gradient.
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
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._edges = {name: [] for name in self.names}

    def _on_input(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            self._note(name, value)

        return hook

    def _on_output(self, name: str, select: str | int | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._active:
                self._note(name, select_tensor(output, select, where=name))

        return hook

    def _note(self, name: str, value: Tensor | None) -> None:
        if self._active and value is not None and value.requires_grad:
            # Not the tensor: an in-place operation after the layer would move it on in the graph.
            self._edges[name].append(get_gradient_edge(value))


@dataclass(frozen=True)
class WeightSuggestion:
    """What :func:`suggest_weight` gives.

    Attributes:
        weight: The suggested weight α.
        fraction: Norm of the gradient of the weighted term over that of the task, at this weight.
        task_norms: Norm of the gradient of the task by student layer, the mean over batches.
        transfer_norms: The same for the term at a weight of 1.
        batches: Number of batches seen.

    Example:
        >>> from lightning_otrt import WeightSuggestion
        >>> print(WeightSuggestion(2.0, 0.5, {"net.0": 0.4}, {"net.0": 0.1}, batches=4))
        weight 2: the transfer term has 0.5 times the gradient of the task
          student layer       task   transfer      ratio
          net.0                0.4        0.2        0.5
    """

    weight: float
    fraction: float
    task_norms: Mapping[str, float]
    transfer_norms: Mapping[str, float]
    batches: int

    def __str__(self) -> str:
        """The weight, and the layers as a table."""
        width = max(map(len, self.task_norms))
        lines = [f"weight {self.weight:.3g}: the transfer term has {self.fraction:g} times the gradient of the task"]
        lines.append(f"  {'student layer'.ljust(width)}  {'task':>9}  {'transfer':>9}  {'ratio':>9}")
        for name, task in self.task_norms.items():
            own = self.weight * self.transfer_norms[name]
            ratio = own / task if task else math.inf
            lines.append(f"  {name.ljust(max(width, 13))}  {task:9.3g}  {own:9.3g}  {ratio:9.3g}")
        return "\n".join(lines)


def suggest_weight(
    student: nn.Module,
    transfer: Any,
    dataloader: Iterable[Any],
    *,
    task_loss: Callable[[Any], Tensor] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    fraction: float = 1.5,
    batches: int = 4,
) -> WeightSuggestion:
    r"""The weight at which the gradient of the transfer term is a given fraction of that of the task.

    .. math:: \alpha = \text{fraction} \cdot
        \frac{\overline{\|\partial L_{task} / \partial h\|}}{\overline{\|\partial \Omega / \partial h\|}}

    with h the outputs of all recorded student layers together and the means over batches. The best weights of feature
    distillation differ by a factor of 100 between pairs of networks. This is a place to start from, not an optimum: the
    ratio changes over training, since the gradient of a task that is learnt vanishes.

    The student runs in the modes in which it is. Its parameters, gradients, buffers and modes, the state of
    ``transfer`` and the random numbers are as before afterwards.

    Args:
        student: The network to train, or the LightningModule, in the state in which training starts.
        transfer: A :class:`RepresentationTransfer`, an :class:`OTRTCallback` (whose weight and schedule do not matter),
            or a teacher, which gets the default layers and cost.
        dataloader: Training batches.
        task_loss: From a batch, on the student's device, to the loss of the task. It calls the student. None needs
            ``loss_fn`` or a LightningModule whose ``training_step`` runs without a Trainer.
        loss_fn: ``loss_fn(student(x), y)`` for batches ``(x, y)``, in place of ``task_loss``.
        fraction: Wanted ratio of the norms, 1 for two equal parts. Over three pairs of networks and two recipes 1.5
            lost least to the best weight (``benchmarks/weight.py``), where the best ratios were from 0.5 to 3.
        batches: Number of batches to average over.

    Returns:
        The weight, with the norms at each layer; it prints as a table.

    Raises:
        TypeError: If the loss of the task cannot be formed from what is given.
        ValueError: If an argument is out of range, there is no batch, or a gradient is zero or not finite.
        RuntimeError: If ``transfer`` is attached already, or no term can be formed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_otrt import RepresentationTransfer, suggest_weight
        >>> student = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> teacher = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> transfer = RepresentationTransfer(teacher, layers={"1": "1"})
        >>> data = [(torch.randn(64, 8), torch.randint(3, (64,))) for _ in range(4)]
        >>> suggestion = suggest_weight(student, transfer, data, loss_fn=nn.functional.cross_entropy)
        >>> transfer.weight = suggestion.weight
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < math.inf:
        raise ValueError(f"Expected argument `fraction` to be positive and finite, but got {fraction!r}.")
    check_count("batches", batches)
    check_module("student", student)
    transfer = getattr(transfer, "transfer", transfer)  # that of a callback
    if not isinstance(transfer, RepresentationTransfer):
        transfer = RepresentationTransfer(transfer)
    loss_of = _task_loss(student, task_loss, loss_fn)
    device = next((tensor.device for tensor in (*student.parameters(), *student.buffers())), torch.device("cpu"))
    found: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(state_restored(student))
        stack.enter_context(_at_weight_one(transfer))
        stack.enter_context(transfer.attached(student))
        probe: GradientProbe | None = None
        for batch in islice(dataloader, batches):
            batch = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
            if probe is None:
                # The layers are found in the first forward, where it is too late to watch them.
                loss_of(batch)
                transfer.discard()
                probe = GradientProbe(student, transfer.pairs)
                stack.callback(probe.remove)
            with probe.watching():
                task = loss_of(batch)
            views = [view for view in transfer.views if view.has_gradient]
            found.append(probe.split(task + transfer.loss().to(task.device), views))
        if probe is None:
            raise ValueError("Expected argument `dataloader` to give at least one batch, but it is empty.")
    return _suggestion(probe.names, found, fraction)


def _suggestion(names: Sequence[str], found: Sequence[tuple[Tensor, Tensor]], fraction: float) -> WeightSuggestion:
    norms = torch.stack([torch.stack(pair) for pair in found]).double().cpu()
    if not bool(norms.isfinite().all()):
        raise ValueError(f"A gradient at the layers {list(names)} is not finite, so there is no weight to suggest.")
    task, own = norms.square().sum(-1).sqrt().mean(0).tolist()
    if task == 0 or own == 0:
        reason = (
            f"The loss of the task has no gradient at the student layers {list(names)}; is it computed from them?"
            if task == 0
            else "The transfer term has no gradient: the student's representations are those of the teacher already, "
            "or no term could be formed."
        )
        raise ValueError(f"{reason} There is no weight to suggest.")
    by_layer = norms.mean(0).tolist()
    return WeightSuggestion(
        weight=fraction * task / own,
        fraction=float(fraction),
        task_norms=dict(zip(names, by_layer[0], strict=True)),
        transfer_norms=dict(zip(names, by_layer[1], strict=True)),
        batches=len(found),
    )


@contextmanager
def _at_weight_one(transfer: RepresentationTransfer) -> Iterator[None]:
    """The plain term, from plans of its own; weight, schedule and state come back."""
    weight, schedule, state = transfer.weight, transfer.schedule, transfer.state_dict()
    transfer.weight, transfer.schedule = 1.0, None
    transfer.reset()
    try:
        yield
    finally:
        transfer.weight, transfer.schedule = weight, schedule
        transfer.load_state_dict(state)


def _task_loss(
    student: nn.Module, task_loss: Callable[[Any], Tensor] | None, loss_fn: Callable[[Any, Any], Tensor] | None
) -> Callable[[Any], Tensor]:
    """The loss of a batch, checked."""
    if task_loss is not None and loss_fn is not None:
        raise TypeError("Expected one of `task_loss` and `loss_fn`, but got both.")
    if task_loss is not None:
        compute, name = task_loss, "task_loss"
    elif loss_fn is not None:
        compute, name = _with_loss_fn(student, loss_fn), "loss_fn"
    elif callable(getattr(student, "training_step", None)):
        compute, name = _with_training_step(student), "training_step"
    else:
        raise TypeError(
            f"The loss of the task is not known for {type(student).__name__}: pass `loss_fn`, called as "
            "loss_fn(student(x), y), or `task_loss`, called with a batch."
        )

    def checked(batch: Any) -> Tensor:
        loss = compute(batch)
        loss = loss.get("loss") if isinstance(loss, Mapping) else loss
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            if isinstance(loss, Tensor) and not loss.requires_grad:
                got += " without one (is the student frozen?)"
            raise TypeError(f"Expected `{name}` to return a scalar loss with gradient, but got {got}.")
        return loss.reshape(())

    return checked


def _with_loss_fn(student: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> Callable[[Any], Tensor]:
    def compute(batch: Any) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                f"Expected batches (x, y) for `loss_fn`, but got {type(batch).__name__}. Pass `task_loss`, a function "
                "of the whole batch, instead."
            )
        return loss_fn(student(batch[0]), batch[1])

    return compute


def _with_training_step(module: Any) -> Callable[[Any], Any]:
    if not getattr(module, "automatic_optimization", True):
        raise TypeError(
            f"{type(module).__name__} uses manual optimization, so that its training_step needs a Trainer and returns "
            "no loss. Pass `task_loss`, a function from a batch to the loss."
        )
    takes_index = len(inspect.signature(module.training_step).parameters) > 1

    def compute(batch: Any) -> Any:
        # Without a Trainer there is nothing to log to, and Lightning would warn of it.
        silenced = {name: lambda *args, **kwargs: None for name in ("log", "log_dict") if name not in vars(module)}
        vars(module).update(silenced)
        try:
            return module.training_step(batch, 0) if takes_index else module.training_step(batch)
        except RuntimeError as error:
            if "Trainer" not in str(error):
                raise
            raise TypeError(
                f"The training_step of {type(module).__name__} needs a Trainer: {error} Pass `task_loss`, a function "
                "from a batch to the loss of the task."
            ) from error
        finally:
            for name in silenced:
                del vars(module)[name]

    return compute
