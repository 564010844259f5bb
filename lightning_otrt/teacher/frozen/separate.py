"""Checks that a teacher and its student share no module, no parameter and no memory."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn

__all__ = ["check_separate"]

#: How to hold a teacher that belongs to the student, but not to its submodules.
_OUTSIDE = (
    "keep it where the student does not register it: in a list, as self.momentum = [encoder], or by "
    "object.__setattr__(self, 'momentum', encoder). Move it to self.device in on_fit_start, and save and load it in "
    "on_save_checkpoint and on_load_checkpoint. A deep copy would not follow its updates."
)


def check_separate(teacher: nn.Module, student: nn.Module) -> None:
    """Check that training the student cannot change the teacher.

    Raises:
        ValueError: If one is or contains the other, they share a parameter or buffer, or the teacher has no values.

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(4, 2)
        >>> check_separate(net, nn.Sequential(net))
        Traceback (most recent call last):
        ValueError: The teacher is the submodule '0' of the student (Sequential): training would change both. ...
    """
    # A task and its wrapper are two objects with one dictionary of attributes.
    if teacher is student or vars(teacher) is vars(student):
        raise ValueError(
            "The teacher is the student itself: it would change with it, and the term would stay 0. For a student "
            "that starts as its teacher use copy.deepcopy(student) as the teacher."
        )
    name = _name_in(teacher, student)
    if name is not None:
        raise ValueError(_why_inside(name, teacher, student))
    name = _name_in(student, teacher)
    if name is not None:
        raise ValueError(
            f"The student is the submodule {name!r} of the teacher ({type(teacher).__name__}): training would change "
            "both. Use copy.deepcopy(teacher) as the teacher."
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


def _name_in(inner: nn.Module, outer: nn.Module) -> str | None:
    """The name of a module inside of another one; None if it is not there."""
    return next((name for name, module in outer.named_modules() if module is inner), None)


def _why_inside(name: str, teacher: nn.Module, student: nn.Module) -> str:
    """What to say of a teacher that is a submodule of the student."""
    what = f"The teacher is the submodule {name!r} of the student ({type(student).__name__})"
    if _is_trained(teacher, student):
        copied = "Use copy.deepcopy(teacher) as the teacher, which stays as it is now."
        return f"{what}: training would change both. {copied} For a momentum encoder: freeze it, and {_OUTSIDE}"
    return (
        f"{what}. It shares no weights with the rest, but what a module registers is put into training mode, moved, "
        "wrapped and sharded with it, and its checkpoints hold the teacher too, while the transfer runs the teacher "
        f"alone. So {_OUTSIDE} It is right for a part that is never updated, such as a frozen backbone."
    )


def _is_trained(teacher: nn.Module, student: nn.Module) -> bool:
    """Whether training a student changes the teacher inside of it: by its own gradients, or those of the rest."""
    inside = {id(module) for module in teacher.modules()}
    rest = [
        tensor
        for module in student.modules()
        if id(module) not in inside
        for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False))
    ]
    of_rest = {key for tensor in rest for key in _identities(tensor)}
    return (
        not rest
        or any(parameter.requires_grad for parameter in teacher.parameters())
        or any(
            key in of_rest for tensor in chain(teacher.parameters(), teacher.buffers()) for key in _identities(tensor)
        )
    )


def _identities(tensor: Tensor) -> tuple[object, ...]:
    """Keys that two tensors have in common if they are one object or share their memory."""
    try:
        memory = tensor.untyped_storage().data_ptr()
    except (RuntimeError, ValueError):  # sparse, lazy and sharded tensors have no single storage
        memory = 0
    return (("object", id(tensor)), ("memory", memory)) if memory else (("object", id(tensor)),)
