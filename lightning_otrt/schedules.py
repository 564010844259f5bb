"""The weight of the transfer term as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from lightning_otrt.checks import check_count, check_number, constructor_call

__all__ = ["CosineDecay", "LinearWarmup", "Schedule", "factor_at"]

#: From the number of completed optimizer steps to a factor on the weights of both terms. It is called once for each
#: step, so that what else it depends on, such as the epoch, may count one step later.
Schedule = Callable[[int], float]


@dataclass(frozen=True)
class LinearWarmup:
    """A factor on the weights of both terms that rises linearly from ``1 / steps`` at the first step to 1.

    Steps are those of the optimizer: ``trainer.global_step``, or calls of :meth:`RepresentationTransfer.loss`.

    Args:
        steps: Number of steps until the full weight.

    Raises:
        TypeError: If ``steps`` is no integer.
        ValueError: If ``steps`` is not positive.

    Example:
        >>> from lightning_otrt import LinearWarmup
        >>> [LinearWarmup(4)(step) for step in range(6)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    steps: int

    def __post_init__(self) -> None:
        _check_steps(self, self.steps, "the full weight is reached")

    def __call__(self, step: int) -> float:
        """The factor at a step."""
        return min(1.0, (step + 1) / self.steps)

    def __repr__(self) -> str:
        """The constructor call; defaults are left out."""
        return constructor_call(self)


@dataclass(frozen=True)
class CosineDecay:
    """A factor on the weights of both terms that falls from 1 to ``final`` along half a cosine.

    Steps are those of the optimizer: ``trainer.global_step``, or calls of :meth:`RepresentationTransfer.loss`.

    Args:
        steps: Number of steps until ``final`` is reached; it stays there.
        final: The last factor.

    Raises:
        TypeError: If ``steps`` is no integer, or ``final`` no number.
        ValueError: If ``steps`` is not positive, or ``final`` is negative or not finite.

    Example:
        >>> from lightning_otrt import CosineDecay
        >>> [round(CosineDecay(4)(step), 2) for step in range(6)]
        [1.0, 0.85, 0.5, 0.15, 0.0, 0.0]
    """

    steps: int
    final: float = 0.0

    def __post_init__(self) -> None:
        _check_steps(self, self.steps, "`final` is reached")
        hint = "In CosineDecay it is the factor on the weights of both terms after the last step: 0 ends without them."
        check_number("final", self.final, hint)

    def __call__(self, step: int) -> float:
        """The factor at a step."""
        progress = min(step, self.steps) / self.steps
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))

    def __repr__(self) -> str:
        """The constructor call; defaults are left out."""
        return constructor_call(self)


def factor_at(step: int, schedule: Schedule | None) -> float:
    """The factor on the weights of both terms at a step.

    Args:
        step: Number of completed optimizer steps.
        schedule: From the step to a factor; None: always the full weights.

    Raises:
        RuntimeError: If the schedule fails.
        ValueError: If it gives anything but a finite number that is not negative.
    """
    try:
        factor = 1.0 if schedule is None else schedule(step)
    except Exception as error:
        name = getattr(schedule, "__qualname__", schedule)
        raise RuntimeError(
            f"`schedule` ({name}) failed at step {step}. {type(error).__name__}: {error}. It is called with the step "
            "alone, and returns a factor on the weights of both terms."
        ) from error
    if isinstance(factor, bool) or not isinstance(factor, Real) or not math.isfinite(factor) or factor < 0:
        raise ValueError(
            f"Expected `schedule` to give a finite number that is not negative, but {schedule!r} gave {factor!r} at "
            f"step {step}. A schedule maps the step to a factor on `weight` and on the weight of `distillation`: "
            "return a float, 0 for a step without them."
        )
    return float(factor)


def _check_steps(schedule: object, steps: int, what: str) -> None:
    kind = type(schedule).__name__
    check_count("steps", steps, f"In {kind} it is the number of optimizer steps until {what}: pass at least 1.")
