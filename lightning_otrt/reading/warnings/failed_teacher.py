"""The error of a teacher that fails on the inputs of the student: it names the two and says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_otrt.reading.neurons.outputs import describe
from lightning_otrt.reading.traced.flow import Flow

__all__ = ["teacher_failed"]


def teacher_failed(
    error: Exception,
    teacher: nn.Module,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    student: nn.Module,
    root: str,
) -> Exception:
    """What to raise in place of an error of the teacher's forward; the error itself where it came from this library.

    Args:
        error: What the forward raised.
        teacher: The teacher.
        inputs: Its arguments.
        student: The student.
        root: Name of its module whose inputs these are.
    """
    if _is_own(error):
        return error
    args, kwargs = inputs
    given = [describe(value) for value in args] + [f"{name}={describe(value)}" for name, value in kwargs.items()]
    whose = f"{root!r} of the student" if root else "the student"
    # The original message stays in one piece: batch-size finders look for "out of memory" in it.
    return RuntimeError(
        f"The teacher ({type(teacher).__name__}) failed on ({', '.join(given)}), from the inputs of {whose} "
        f"({type(student).__name__}). {type(error).__name__}: {error}. If it needs other inputs, make them with "
        "`teacher_inputs`, a function of the student's inputs. If it should get the inputs of another module of "
        "the student, name that module as `student_root`."
    )


def _is_own(error: Exception) -> bool:
    """Whether code of this library raised it, such as a hook, or what that code called in torch."""
    frame, is_own = error.__traceback__, False
    while frame is not None:
        place = str(frame.tb_frame.f_globals.get("__name__"))
        if place.startswith("lightning_otrt.") and place != Flow.__module__:  # which runs all operations of a trace
            is_own = True
        elif place == "torch.nn.modules.module":  # it calls a module, and then its hooks
            is_own = False
        frame = frame.tb_next
    return is_own
