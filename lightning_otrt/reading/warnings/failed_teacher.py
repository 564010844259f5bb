"""The errors of a teacher, and of `teacher_inputs`, that fail on the inputs of the student: they say what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lightning_otrt.reading.neurons.outputs import describe
from lightning_otrt.reading.traced.flow import Flow

__all__ = ["inputs_failed", "teacher_failed"]


def teacher_failed(
    error: Exception,
    teacher: nn.Module,
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]],
    student: nn.Module,
    root: str,
) -> Exception:
    """What to raise in place of an error of the teacher's forward.

    The error itself where it came from this library, or where memory was short, which other inputs would not cure.

    Args:
        error: What the forward raised.
        teacher: The teacher.
        inputs: Its arguments.
        student: The student.
        root: Name of its module whose inputs these are.
    """
    if isinstance(error, torch.OutOfMemoryError) or _is_own(error.__traceback__):
        return error
    whose = f"{root!r} of the student" if root else "the student"
    # The original message stays in one piece: batch-size finders look for "out of memory" in it.
    return RuntimeError(
        f"The teacher ({type(teacher).__name__}) failed on ({_described(inputs)}), from the inputs of {whose} "
        f"({type(student).__name__}). {type(error).__name__}: {error}. If it needs other inputs, make them with "
        "`teacher_inputs`, a function of the student's inputs. If it should get the inputs of another module of "
        "the student, name that module as `student_root`."
    )


def inputs_failed(
    error: Exception, function: Callable[..., Any], inputs: tuple[tuple[Any, ...], Mapping[str, Any]]
) -> Exception:
    """What to raise in place of an error of ``teacher_inputs``; the error itself where it came from this library.

    Args:
        error: What the function raised, caught where it was called.
        function: What the user passed.
        inputs: Its arguments.
    """
    inside = error.__traceback__.tb_next if error.__traceback__ is not None else None
    if isinstance(error, torch.OutOfMemoryError) or _is_own(inside):
        return error
    return RuntimeError(
        f"`teacher_inputs` ({getattr(function, '__qualname__', function)}) failed on ({_described(inputs)}), the "
        f"inputs of the student's root. {type(error).__name__}: {error}. It gets the arguments of the student's root, "
        "as the student gets them, and returns those of the teacher. Tensors of its own have to be on the device of "
        "these: `mean.to(x)`."
    )


def _described(inputs: tuple[tuple[Any, ...], Mapping[str, Any]]) -> str:
    args, kwargs = inputs
    return ", ".join([*map(describe, args), *(f"{name}={describe(value)}" for name, value in kwargs.items())])


def _is_own(frame: TracebackType | None) -> bool:
    """Whether code of this library raised it, such as a hook, or what that code called in torch."""
    is_own = False
    while frame is not None:
        place = str(frame.tb_frame.f_globals.get("__name__"))
        if place.startswith("lightning_otrt.") and place != Flow.__module__:  # which runs all operations of a trace
            is_own = True
        elif place == "torch.nn.modules.module":  # it calls a module, and then its hooks
            is_own = False
        frame = frame.tb_next
    return is_own
