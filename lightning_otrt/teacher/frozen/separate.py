"""Checks that a teacher and its student share no module, no parameter and no memory."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn

__all__ = ["check_separate"]


def check_separate(teacher: nn.Module, student: nn.Module) -> None:
    """Check that training the student cannot change the teacher.

    Raises:
        ValueError: If one is or contains the other, they share a parameter or buffer, or the teacher has no values.

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(4, 2)
        >>> check_separate(net, nn.Sequential(net))
        Traceback (most recent call last):
        ValueError: The teacher is the submodule '0' of the student, so they share weights and modes. ...
    """
    # A task and its wrapper are two objects with one dictionary of attributes.
    if teacher is student or vars(teacher) is vars(student):
        raise ValueError(
            "The teacher is the student itself: it would change with it, and the term would stay 0. For a student "
            "that starts as its teacher use copy.deepcopy(student) as the teacher."
        )
    for a, inner, b, outer in (("teacher", teacher, "student", student), ("student", student, "teacher", teacher)):
        name = next((name for name, module in outer.named_modules() if module is inner), None)
        if name is not None:
            raise ValueError(
                f"The {a} is the submodule {name!r} of the {b}, so they share weights and modes. Use "
                "copy.deepcopy(teacher) as the teacher, or keep it outside the student."
            )
    of_student = {
        key: name
        for name, tensor in chain(student.named_parameters(), student.named_buffers())
        for key in _identities(tensor)
    }
    for name, tensor in chain(teacher.named_parameters(), teacher.named_buffers()):
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            what = "on the meta device" if tensor.is_meta else "not initialised"
            raise ValueError(f"{name!r} of the teacher is {what}: materialise the teacher first, with its weights.")
        shared = next((of_student[key] for key in _identities(tensor) if key in of_student), None)
        if shared is not None:
            raise ValueError(
                f"The teacher shares {name!r} with the student, where it is {shared!r}: training would change both. "
                "Use copy.deepcopy(teacher) as the teacher."
            )


def _identities(tensor: Tensor) -> tuple[object, ...]:
    """Keys that two tensors have in common if they are one object or share their memory."""
    try:
        memory = tensor.untyped_storage().data_ptr()
    except (RuntimeError, ValueError):  # sparse, lazy and sharded tensors have no single storage
        memory = 0
    return (("object", id(tensor)), ("memory", memory)) if memory else (("object", id(tensor)),)
