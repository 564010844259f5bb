"""Checks of the first batch and its plans: errors for bad values, warnings for what will train badly."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_otrt.transport.correlation import CorrelationCost
from lightning_otrt.transport.cost import Cost, Plan
from lightning_otrt.transport.diagnostics import diagnose
from lightning_otrt.transport.moments import DEAD_SHARE
from lightning_otrt.transport.tensor_checks import check_values
from lightning_otrt.transport.tensors import norms

__all__ = ["dead_neurons", "inspect_batch", "inspect_plan"]

#: From this epsilon on a plan may match nothing. It does if its entropy is this share of the largest or more.
BLURRING_EPSILON = 0.05
UNIFORM_ENTROPY = 0.97
#: If all neurons but one make up less than so many times ε of the mean cost, the plan hardly tells them apart.
HUGE_SHARE = 3.0


def inspect_batch(
    names: tuple[str, str], y: Tensor, x: Tensor, cost: Cost, epsilon: float, otherwise: str = "cost='euclidean'"
) -> Iterator[str]:
    """Warnings about neurons with which the term will train badly.

    Args:
        names: Student and teacher layer.
        y: Student neurons ``(N, n)``.
        x: Teacher neurons ``(M, n)``.
        cost: The ground cost.
        epsilon: Entropic regularisation relative to the mean cost.
        otherwise: Options that need no correlations.

    Yields:
        What to warn of.

    Raises:
        ValueError: If values are not finite, or their squares leave the range of their type.
    """
    student, teacher = (f"{kind} layer {name!r}" for kind, name in zip(("Student", "Teacher"), names, strict=True))
    check_values(x, teacher)
    check_values(y, student)
    if cost.scaled:
        yield from _huge_neurons((student, teacher), (y, x), epsilon)
    # With a single observation every neuron is constant, which says nothing about it.
    if cost.min_observations <= y.shape[-1] and isinstance(cost, CorrelationCost):
        yield from dead_neurons(student, y, "Check its activations and the learning rate", otherwise)
        yield from dead_neurons(teacher, x, "Check its weights and `teacher_inputs`", otherwise)


def inspect_plan(names: tuple[str, str], plan: Plan | None, epsilon: float) -> Iterator[str]:
    """A warning if an entropic plan matches almost nothing."""
    # With a small epsilon this passes: the neurons of an untrained student are alike only at first.
    if plan is None or epsilon < BLURRING_EPSILON or 1 in plan.matrix.shape:
        return
    entropy = float(diagnose(plan.matrix).entropy)
    if entropy > UNIFORM_ENTROPY:
        yield (
            "The transport plan of {!r} -> {!r} is nearly uniform, ".format(*names)
            + f"so that it matches almost nothing: its entropy is {entropy:.0%} of the largest at "
            f"epsilon={epsilon:g}. Use a smaller `epsilon`, such as 0.01, or plan='exact'."
        )


def dead_neurons(where: str, neurons: Tensor, advice: str, otherwise: str) -> Iterator[str]:
    """Warnings where most neurons ``(N, n)`` of a layer, or all of them, count as dead."""
    count = neurons.shape[0]
    # A few observations are nearly always enough to see that most neurons are alive.
    if 2 * _overshadowed(neurons[:, :64]) > count and 2 * (overshadowed := _overshadowed(neurons)) > count:
        yield (
            f"{where}: {overshadowed} of its {count} neurons vary by less than {DEAD_SHARE:g} of the layer's mean, and "
            "count as dead: they correlate with no neuron and have no gradient. Either a few neurons are huge, or the "
            f"others have new weights near 0, such as a layer scale. {advice}, or take a layer behind a normalisation."
        )
    first = neurons[:, :1]
    if torch.equal(neurons[:, -1:], first) and torch.equal(neurons, first.expand_as(neurons)):
        yield (
            f"{where} is constant over the first batch: all of its {count} neurons are dead. They correlate with no "
            f"neuron and have no gradient. {advice}, or use {otherwise}."
        )


def _huge_neurons(layers: tuple[str, str], batch: tuple[Tensor, Tensor], epsilon: float) -> Iterator[str]:
    """A warning if squared distances to one huge neuron make up nearly all of the mean cost."""
    sides = [norms(side) for side in batch]
    total = sum(torch.linalg.vector_norm(side).item() ** 2 / side.numel() for side in sides)
    for layer, side in zip(layers, sides, strict=True):
        share = side.max().item() ** 2 / side.numel() / (total or 1.0)
        if side.numel() > 1 and 1 - share < HUGE_SHARE * epsilon:
            yield (
                f"{layer}: a single one of its {side.numel()} neurons makes {share:.1%} of the mean "
                f"cost, to which epsilon={epsilon:g} is relative, so that the plan hardly tells the others "
                "apart. Use cost='correlation', or choose a layer behind a normalisation."
            )


def _overshadowed(neurons: Tensor) -> int:
    """How many neurons ``(N, n)`` vary, but so little beside the others that they count as dead."""
    spreads = torch.linalg.vector_norm(neurons - neurons.mean(-1, keepdim=True), dim=-1)
    quiet = spreads <= DEAD_SHARE * spreads.mean()
    return int((quiet & (neurons.amax(-1) != neurons.amin(-1))).sum()) if quiet.any() else 0
