"""Which student a run has trained: another one would go on with plans that are not its own."""

from __future__ import annotations

import weakref

from torch import nn

__all__ = ["LastStudent"]


class LastStudent:
    """Remembers a student by its first parameter, since wrappers of one network are other modules.

    The parameter is not kept alive, and copies of this object have forgotten it.

    Example:
        >>> from torch import nn
        >>> last, net = LastStudent(), nn.Linear(2, 2)
        >>> last.note(net)
        >>> last.is_other(nn.Sequential(net)), last.is_other(nn.Linear(2, 2))
        (False, True)
    """

    def __init__(self) -> None:
        self._parameter: weakref.ref[nn.Parameter] | None = None

    def note(self, student: nn.Module) -> None:
        """Remember this student."""
        parameter = next(student.parameters(), None)
        self._parameter = None if parameter is None else weakref.ref(parameter)

    def is_other(self, student: nn.Module) -> bool:
        """Whether another student than this one was noted."""
        return self._parameter is not None and self._parameter() is not next(student.parameters(), None)

    def forget(self) -> None:
        """Forget the student."""
        self._parameter = None

    def __reduce__(self) -> tuple[type[LastStudent], tuple[()]]:
        return LastStudent, ()
