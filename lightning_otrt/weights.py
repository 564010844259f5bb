"""The weights of both terms at a step."""

from __future__ import annotations

from typing import NamedTuple

from lightning_otrt.schedules import Schedule, factor_at

__all__ = ["StepWeights", "Weights"]


class Weights(NamedTuple):
    """The weights of both terms in a call.

    Attributes:
        transport: α, that of the transport of neurons.
        distillation: That of the logits.
    """

    transport: float
    distillation: float


class StepWeights:
    """The weights at the current step. The schedule is called once for each step, when they are first needed.

    Args:
        full: The weights without a schedule.
        schedule: From the step to a factor on both.

    Example:
        >>> weights = StepWeights(Weights(32.0, 0.5), lambda step: step / 4)
        >>> weights.step = 2
        >>> weights.now()
        Weights(transport=16.0, distillation=0.25)
    """

    def __init__(self, full: Weights, schedule: Schedule | None) -> None:
        #: The step that the schedule sees.
        self.step = 0
        #: The weights of the last call; None before the first.
        self.last: Weights | None = None
        #: Whether calls of this loop repeat batches, as the closures of LBFGS do.
        self._repeats = False
        self.set(full, schedule)

    def set(self, full: Weights, schedule: Schedule | None) -> None:
        """Go on with other weights, or with another schedule."""
        self.full, self._schedule = full, schedule
        #: The last step that was asked for, and its weights.
        self._known: tuple[int, Weights] | None = None

    def of_call(self, *, again: bool = False) -> Weights:
        """The weights of a call, those of the last one if it is the same batch again: the step has gone on since."""
        self._repeats |= again
        if not again or self.last is None:
            self.last = self.now()
        return self.last

    def to_record(self) -> Weights:
        """The weights at this step, and those of the last call where its batch may come again, whichever are larger."""
        now, last = self.now(), self.last
        return now if last is None or not self._repeats else Weights(*map(max, now, last))

    def now(self) -> Weights:
        """The weights at this step.

        Raises:
            ValueError: If the schedule gives anything but a finite number that is not negative.
            RuntimeError: If the schedule fails.
        """
        if self._known is None or self._known[0] != self.step:
            factor = factor_at(self.step, self._schedule)
            self._known = self.step, Weights(self.full.transport * factor, self.full.distillation * factor)
        return self._known[1]
