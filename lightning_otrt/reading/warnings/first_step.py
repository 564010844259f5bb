"""What is compared in the first step alone: the forward of training with the traced one."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.warnings.first_shapes import FirstShapes
from lightning_otrt.reading.warnings.train_only import FirstInput

__all__ = ["FirstStep"]


class FirstStep:
    """Compares what enters the student's first layer, and the shapes of its recorded layers.

    Attributes:
        input: What enters the first layer.
    """

    def __init__(self) -> None:
        self.input = FirstInput()
        self._shapes = FirstShapes()

    def compare_next(self, trace: Trace, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Compare the traced forward with the next one.

        Args:
            trace: The traced forward of the student.
            modules: Its recorded layers by name.
        """
        if not trace.draws_random:  # which has a warning of its own
            self.input.compare_next()
        self._shapes.compare_next(trace, modules)

    def end(self) -> None:
        """Remove the hooks. Warn of other shapes, unless a warning of other inputs explains them."""
        if self.input.has_warned:
            self._shapes.forget()
        self.input.forget()
        self._shapes.take_warning()

    def forget(self) -> None:
        """Remove the hooks, and what they noted."""
        self.input.forget()
        self._shapes.forget()
