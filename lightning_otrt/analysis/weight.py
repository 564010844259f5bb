"""The weight at which the transfer term has a given share of the gradient at the recorded layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_otrt.analysis.batches import check_batches, to_device
from lightning_otrt.analysis.gradient_share import GradientNorms, GradientProbe
from lightning_otrt.analysis.task_loss import find_task_loss
from lightning_otrt.checks import check_count, check_module
from lightning_otrt.distillation import as_distillation
from lightning_otrt.reading.extra_forwards.evaluation import state_restored
from lightning_otrt.teacher.loading.load import TeacherSource
from lightning_otrt.transfer import RepresentationTransfer

if TYPE_CHECKING:
    from lightning_otrt.trainer.transfer_callback import TransferCallback

__all__ = ["WeightSuggestion", "suggest_weight"]


@dataclass(frozen=True)
class WeightSuggestion:
    """The result of :func:`suggest_weight`.

    Attributes:
        weight: The suggested weight α.
        ratio: Norm of the gradient of the weighted term over that of the task, at this weight.
        task_norms: Norm of the gradient of the task by student layer, the mean over batches.
        transfer_norms: The same for the term at a weight of 1.
        batches: Number of batches seen.
        distillation_norms: The same for the distillation of logits at its own weight; empty where there is none.

    Example:
        >>> from lightning_otrt import WeightSuggestion
        >>> print(WeightSuggestion(2.0, 0.5, {"net.0": 0.4}, {"net.0": 0.1}, batches=4))
        weight 2: the transfer term has 0.5 times the gradient of the task
          student layer       task   transfer      ratio
          net.0                0.4        0.2        0.5
    """

    weight: float
    ratio: float
    task_norms: Mapping[str, float]
    transfer_norms: Mapping[str, float]
    batches: int
    distillation_norms: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """The weight, and the layers as a table."""
        width = max(13, *map(len, self.task_norms))
        lines = [f"weight {self.weight:.3g}: the transfer term has {self.ratio:g} times the gradient of the task"]
        heading = f"  {'student layer'.ljust(width)}  {'task':>9}  {'transfer':>9}  {'ratio':>9}"
        lines.append(f"{heading}  {'distillation':>12}" if self.distillation_norms else heading)
        for name, task in self.task_norms.items():
            own = self.weight * self.transfer_norms[name]
            here = own / task if task else math.inf
            line = f"  {name.ljust(width)}  {task:9.3g}  {own:9.3g}  {here:9.3g}"
            lines.append(f"{line}  {self.distillation_norms[name]:12.3g}" if self.distillation_norms else line)
        return "\n".join(lines)


def suggest_weight(
    student: nn.Module,
    transfer: RepresentationTransfer | TransferCallback | TeacherSource,
    dataloader: Iterable[Any],
    *,
    task_loss: Callable[[Any], Tensor] | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    ratio: float = 1.5,
    max_batches: int = 4,
) -> WeightSuggestion:
    r"""The weight at which the gradients of the transfer term and of the task have a given ratio.

    .. math:: \alpha = \text{ratio} \cdot
        \frac{\overline{\|\partial L_{task} / \partial h\|}}{\overline{\|\partial \Omega / \partial h\|}}

    with h the outputs of all recorded student layers together, and means over batches. The best weights of feature
    distillation differ by a factor of 100 between pairs of networks. Take the result as a first value to try, not as an
    optimum: the gradient of the task becomes smaller during training, so the ratio changes.

    The loss of the task is what ``task_loss`` gives, without the transfer's distillation of logits, whose gradient is
    measured apart.

    The student keeps its modes (train or eval) while it runs. Afterwards its parameters, gradients, buffers and modes,
    the state of ``transfer`` and the random number generators of CPU and CUDA are as before.

    Args:
        student: The network to train, or the LightningModule, in the state in which training starts.
        transfer: A :class:`RepresentationTransfer`, an :class:`OTRTCallback` (its weight and schedule are ignored), or
            a teacher, which is used with the default layers and cost.
        dataloader: Training batches.
        task_loss: Function from a batch, on the student's device, to the loss of the task. It calls the student. If
            None, ``loss_fn`` is needed, or a LightningModule whose ``training_step`` runs without a Trainer.
        loss_fn: Called as ``loss_fn(student(x), y)`` for batches ``(x, y)``, instead of ``task_loss``.
        ratio: Wanted ratio of the norms, 1 for two equal parts. On three pairs of networks and two recipes 1.5 came
            closest to the best weight (``benchmarks/weight.py``); the best ratios were between 0.5 and 3.
        max_batches: Number of batches to average over, if there are as many.

    Returns:
        The weight, with the norms at each layer. It prints as a table.

    Raises:
        TypeError: If the loss of the task cannot be computed from what is given.
        ValueError: If an argument is out of range, there is no batch, or a gradient is zero or not finite.
        RuntimeError: If ``transfer`` is already attached, or no term can be computed.

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
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < ratio < math.inf:
        raise ValueError(f"Expected argument `ratio` to be positive and finite, but got {ratio!r}.")
    check_count("max_batches", max_batches)
    check_module("student", student)
    check_batches(dataloader)
    held = getattr(transfer, "transfer", None)  # a callback holds its transfer; a teacher may have a part of that name
    given: Any = held if isinstance(held, RepresentationTransfer) else transfer
    transfer = given if isinstance(given, RepresentationTransfer) else RepresentationTransfer(given)
    loss_of = find_task_loss(student, task_loss, loss_fn)
    device = next((tensor.device for tensor in (*student.parameters(), *student.buffers())), torch.device("cpu"))
    norms: list[GradientNorms] = []
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(state_restored(student))
        stack.enter_context(_at_weight_one(transfer))
        stack.enter_context(transfer.attached(student))
        probe: GradientProbe | None = None
        for batch in islice(dataloader, max_batches):
            batch = to_device(batch, device)
            if probe is None:
                # The first forward chooses the layers, so hooks on them come after it, and it is run again.
                loss_of(batch)
                transfer.discard()
                probe = GradientProbe(student, transfer.pairs)
                stack.callback(probe.remove)
            with probe.watching():
                task = loss_of(batch)
            views = [view for view in transfer.views if view.has_gradient]
            norms.append(probe.split(task + transfer.loss().to(task.device), views))
        if probe is None:
            raise ValueError("Expected argument `dataloader` to give at least one batch, but it is empty.")
    return _suggestion(probe.names, norms, ratio, distills=as_distillation(transfer.distillation).weight > 0)


def _suggestion(
    names: Sequence[str], norms: Sequence[GradientNorms], ratio: float, *, distills: bool
) -> WeightSuggestion:
    """The weight for the norms at each layer of each batch."""
    table = torch.stack([torch.stack(parts) for parts in norms]).cpu().double()
    if not bool(table.isfinite().all()):
        raise ValueError(f"No weight can be suggested: a gradient at the layers {list(names)} is not finite.")
    task, own, _ = table.square().sum(-1).sqrt().mean(0).tolist()
    if task == 0:
        raise ValueError(
            f"No weight can be suggested: the loss of the task has no gradient at the student layers {list(names)}. Is "
            "it computed from their outputs?"
        )
    if own == 0:
        raise ValueError(
            "No weight can be suggested: the transfer term has no gradient. Either the student's representations equal "
            "those of the teacher, or no term could be computed."
        )
    by_layer = table.mean(0).tolist()
    return WeightSuggestion(
        weight=ratio * task / own,
        ratio=float(ratio),
        task_norms=dict(zip(names, by_layer[0], strict=True)),
        transfer_norms=dict(zip(names, by_layer[1], strict=True)),
        batches=len(norms),
        distillation_norms=dict(zip(names, by_layer[2], strict=True)) if distills else {},
    )


@contextmanager
def _at_weight_one(transfer: RepresentationTransfer) -> Iterator[None]:
    """Weight 1, no schedule and an empty state inside the block; all three are restored after it."""
    weight, schedule, state = transfer.weight, transfer.schedule, transfer.state_dict()
    transfer.weight, transfer.schedule = 1.0, None
    transfer.reset()
    try:
        yield
    finally:
        transfer.weight, transfer.schedule = weight, schedule
        transfer.load_state_dict(state)
