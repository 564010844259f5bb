"""The weight of the transfer term as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["CosineDecay", "LinearWarmup", "Schedule", "weight_at"]

#: From the number of completed optimizer steps to a factor on the weight.
Schedule = Callable[[int], float]


@dataclass(frozen=True)
class LinearWarmup:
    """A factor on the weight that rises linearly from ``1 / steps`` at the first step to 1.

    Steps are those of the optimizer: ``trainer.global_step``, or calls of :meth:`RepresentationTransfer.loss`.

    Args:
        steps: Number of steps until the full weight.

    Raises:
        ValueError: If ``steps`` is not positive.

    Example:
        >>> from lightning_otrt import LinearWarmup
        >>> [LinearWarmup(4)(step) for step in range(6)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Expected argument `steps` to be at least 1, but got {self.steps}.")

    def __call__(self, step: int) -> float:
        """The factor at a step."""
        return min(1.0, (step + 1) / self.steps)


@dataclass(frozen=True)
class CosineDecay:
    """A factor on the weight that falls from 1 to ``final`` along half a cosine.

    Steps are those of the optimizer: ``trainer.global_step``, or calls of :meth:`RepresentationTransfer.loss`.

    Args:
        steps: Number of steps until ``final`` is reached; it stays there.
        final: The last factor.

    Raises:
        ValueError: If ``steps`` is not positive, or ``final`` is negative or not finite.

    Example:
        >>> from lightning_otrt import CosineDecay
        >>> [round(CosineDecay(4)(step), 2) for step in range(6)]
        [1.0, 0.85, 0.5, 0.15, 0.0, 0.0]
    """

    steps: int
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Expected argument `steps` to be at least 1, but got {self.steps}.")
        if not (math.isfinite(self.final) and self.final >= 0):
            raise ValueError(f"Expected argument `final` to be finite and not negative, but got {self.final}.")

    def __call__(self, step: int) -> float:
        """The factor at a step."""
        progress = min(step, self.steps) / self.steps
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


def weight_at(step: int, weight: float, schedule: Schedule | None) -> float:
    """The weight at a step.

    Raises:
        ValueError: If the schedule gives anything but a finite number that is not negative.
    """
    factor = 1.0 if schedule is None else schedule(step)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor) or factor < 0:
        raise ValueError(
            f"Expected `schedule` to give a finite number that is not negative, but {schedule!r} gave {factor!r} at "
            f"step {step}. A schedule maps the step to a factor on `weight`."
        )
    return weight * float(factor)
