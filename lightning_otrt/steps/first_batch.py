"""A look at the first batch and its plans: what is wrong is an error, what will train badly a message to warn with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_otrt.transport.correlation import DEAD_SHARE, CorrelationCost
from lightning_otrt.transport.cost import Cost, Plan
from lightning_otrt.transport.diagnostics import diagnose
from lightning_otrt.transport.tensor_checks import check_values
from lightning_otrt.transport.tensors import norms

__all__ = ["inspect_batch", "inspect_plan"]

#: From this epsilon on a plan may match nothing, which is so where its entropy is this share of the largest.
BLURRING_EPSILON = 0.05
UNIFORM_ENTROPY = 0.97
#: Where all but one neuron make less than this many ε of the mean cost, the plan hardly tells them apart.
HUGE_SHARE = 3.0


def inspect_batch(names: tuple[str, str], y: Tensor, x: Tensor, cost: Cost, epsilon: float) -> Iterator[str]:
    """What will train badly with the neurons of the student ``(N, n)`` and the teacher ``(M, n)``.

    Args:
        names: Student and teacher layer.
        y: Neurons of the student.
        x: Neurons of the teacher.
        cost: The ground cost.
        epsilon: Entropic regularisation relative to the mean cost.

    Raises:
        ValueError: If values are not finite, or their squares leave the range of their type.
    """
    student, teacher = (f"{kind} layer {name!r}" for kind, name in zip(("Student", "Teacher"), names, strict=True))
    check_values(x, teacher)
    check_values(y, student)
    if cost.scaled:
        yield from _huge_neurons((student, teacher), (y, x), epsilon)
    # A single column is constant without being dead, and has no correlation anyway.
    if cost.min_observations <= y.shape[-1] and isinstance(cost, CorrelationCost):
        yield from _dead_neurons(student, y, "Check its activations and the learning rate")
        yield from _dead_neurons(teacher, x, "Check its weights and `teacher_inputs`")


def inspect_plan(names: tuple[str, str], plan: Plan | None, epsilon: float) -> Iterator[str]:
    """Whether an entropic plan matches almost nothing."""
    # With a small epsilon an untrained student, whose neurons are alike, begins like this and leaves it behind.
    if plan is None or epsilon < BLURRING_EPSILON or 1 in plan.matrix.shape:
        return
    entropy = float(diagnose(plan.matrix).entropy)
    if entropy > UNIFORM_ENTROPY:
        yield (
            "The transport plan of {!r} -> {!r} is nearly uniform, ".format(*names)
            + f"so that it matches almost nothing: its entropy is {entropy:.0%} of the largest at "
            f"epsilon={epsilon:g}. Use a smaller `epsilon`, such as 0.01, or plan='exact'."
        )


def _dead_neurons(where: str, neurons: Tensor, advice: str) -> Iterator[str]:
    count = neurons.shape[0]
    # Some columns nearly always tell that most neurons are alive, without a look at all of them.
    if 2 * _overshadowed(neurons[:, :64]) > count and 2 * (overshadowed := _overshadowed(neurons)) > count:
        yield (
            f"{where}: {overshadowed} of its {count} neurons vary by less than {DEAD_SHARE:g} of the layer's mean, "
            "which a few huge ones make large, and count as dead: a correlation with them has no gradient. "
            f"{advice}, or choose a layer behind a normalisation."
        )
    first = neurons[:, :1]
    if not bool((neurons[:, -1:] != first).any()) and not bool((neurons != first).any()):
        yield (
            f"{where} is constant over the first batch: all of its {count} neurons are dead, and a "
            f"correlation with dead neurons has no gradient. {advice}, or use cost='euclidean'."
        )


def _huge_neurons(layers: tuple[str, str], batch: tuple[Tensor, Tensor], epsilon: float) -> Iterator[str]:
    """A squared distance to a huge neuron can outweigh, in the mean, all that tells the others apart."""
    squares = [norms(side).square_() for side in batch]
    total = torch.stack([side.mean() for side in squares]).sum()
    for layer, side in zip(layers, squares, strict=True):
        share = float(side.max() / side.numel() / total)
        if side.numel() > 1 and 1 - share < HUGE_SHARE * epsilon:
            yield (
                f"{layer}: a single one of its {side.numel()} neurons makes {share:.1%} of the mean "
                f"cost, to which epsilon={epsilon:g} is relative, so that the plan hardly tells the others "
                "apart. Use cost='correlation', or choose a layer behind a normalisation."
            )


def _overshadowed(neurons: Tensor) -> int:
    """How many neurons ``(N, n)`` vary, but so little beside the others that they count as dead."""
    spreads = torch.linalg.vector_norm(neurons - neurons.mean(-1, keepdim=True), dim=-1)
    varies = neurons.amax(-1) != neurons.amin(-1)
    return int((varies & (spreads <= DEAD_SHARE * spreads.mean())).sum())
