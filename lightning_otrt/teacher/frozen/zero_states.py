"""Recurrent states of zeros: those of new sequences, which a teacher may start from, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_otrt.reading.traced.states import StateShapes
from lightning_otrt.teacher.host_copy import HostCopy

__all__ = ["ZeroStates", "zeros_for"]


class ZeroStates:
    """Checks that states are zeros.

    To look at values waits for the device. Where that may not be, they are on their way to the host until the next
    step, which raises the error.

    Args:
        may_wait: Whether it may wait.

    Example:
        >>> states = ZeroStates(may_wait=True)
        >>> states.check([torch.zeros(2, 4, 8)], ValueError("not zero"))
        >>> states.check([torch.ones(2, 4, 8)], ValueError("not zero"))
        Traceback (most recent call last):
            ...
        ValueError: not zero
    """

    def __init__(self, *, may_wait: bool) -> None:
        self.may_wait = may_wait
        self._copied: list[tuple[HostCopy, Exception]] = []

    def check(self, states: Sequence[Tensor], error: Exception) -> None:
        """Raise the error, now or in the next :meth:`check_earlier`, if there is another number among the states."""
        are_zero = torch.stack([(state == 0).all() for state in states]).all()
        if self.may_wait or are_zero.device.type == "cpu":
            if not _read(are_zero):
                raise error
        else:
            self._copied.append((HostCopy(are_zero), error))

    def check_earlier(self) -> None:
        """Raise the error of an earlier step."""
        copied, self._copied = self._copied, []
        for are_zero, error in copied:
            if not _read(are_zero.wait()):
                raise error

    def __getstate__(self) -> dict[str, Any]:
        """Without what is on its way, which cannot be pickled."""
        return {**vars(self), "_copied": []}


def _read(flag: Tensor) -> bool:
    """A function of its own: fake tensors, which have no values, cannot pass through it in tests."""
    return bool(flag)


def zeros_for(state: Tensor, student: StateShapes, teacher: StateShapes) -> Tensor:
    """A state of zeros with the layers and the width of the teacher, where all its recurrent modules have the same.

    Args:
        state: A state of zeros of the student.
        student: Shapes of the states of the student.
        teacher: Shapes of the states of the teacher.

    Example:
        >>> shapes = StateShapes(frozenset({(2, 8)})), StateShapes(frozenset({(3, 16)}))
        >>> zeros_for(torch.zeros(2, 4, 8), *shapes).shape
        torch.Size([3, 4, 16])
    """
    samples = student.samples(state)
    if samples is not None and len(teacher.layers) == 1:
        ((layers, width),) = teacher.layers
        return state.new_zeros(layers, samples, width)
    if state.dim() == 2 and state.shape[1] in student.cells and len(teacher.cells) == 1:
        (width,) = teacher.cells
        return state.new_zeros(len(state), width)
    return state
