"""How a teacher is called on the inputs of a student: what the first forward of both networks shows."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_otrt.teacher.frozen.past_states import PastStates

__all__ = ["TeacherCall"]


@dataclass(frozen=True)
class TeacherCall:
    """What of a teacher runs, and on which of the inputs of the student's root.

    Args:
        root: Name of the submodule that runs, ``""`` for the whole.
        path: The same name with what wrappers add to it, such as ``"module.encoder"``.
        method: Name of its method that is called in place of its forward, ``""`` for the forward.
        names: By which names it takes the positional arguments of the student, see
            :func:`~lightning_otrt.reading.traced.arguments.positions_by_name`.
        past_states: Finds states of an earlier forward among the student's inputs.
        draws_random: Whether it draws random numbers in evaluation mode.
    """

    root: str = ""
    path: str = ""
    method: str = ""
    names: tuple[str | None, ...] = ()
    past_states: PastStates = field(default_factory=PastStates)
    draws_random: bool = False
