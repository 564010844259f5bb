"""Which method of the student called the module that is taken for its root."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from lightning_otrt.layers.names import is_inside, named_layers

__all__ = ["calling_method", "holders", "running_holder", "with_caller"]


def calling_method(student: nn.Module, root: str) -> str:
    """The outermost running method, other than a forward, of a module around ``root``: what ``student_root`` may name.

    It is ``""`` where there is none. Methods of the student itself do not count: its step is one.

    Args:
        student: The student.
        root: Name of a module whose forward starts.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.stem = nn.Linear(2, 2)
        ...     def encode(self) -> str:
        ...         return calling_method(nn.ModuleDict({"net": self}), "net.stem")
        >>> Net().encode()
        'net:encode'
    """
    around = {id(module): name for name, module in named_layers(student).items() if name and is_inside(root, name)}
    found, frame = "", inspect.currentframe()
    while frame is not None:
        name, method = around.get(id(frame.f_locals.get("self")), root), frame.f_code.co_name
        # Functions that call a forward begin with an underscore.
        if name != root and method != "forward" and not method.startswith(("_", "<")):
            found = f"{name}:{method}"
        frame = frame.f_back
    return found


def holders(student: nn.Module, root: str) -> dict[int, str]:
    """The names of the modules of the student around ``root``, by the ids of the modules."""
    return {
        id(module): name for name, module in named_layers(student).items() if name != root and is_inside(root, name)
    }


def running_holder(around: Mapping[int, str]) -> str | None:
    """The outermost of these modules whose forward is running, by name; None where there is none.

    Args:
        around: Names of modules by their ids, see :func:`holders`.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.stem = nn.Linear(2, 2)
        ...     def forward(self) -> str | None:
        ...         return running_holder(holders(nn.ModuleDict({"net": self}), "net.stem"))
        ...     def training_step(self) -> str | None:
        ...         return running_holder(holders(nn.ModuleDict({"net": self}), "net.stem"))
        >>> Net()(), Net().training_step()
        ('net', None)
    """
    found, frame = None, inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_code.co_argcount:
            own = frame.f_locals.get(frame.f_code.co_varnames[0])  # `self`, whatever it is called
            found = around.get(id(own), found)
        frame = frame.f_back
    return found


def with_caller(error: Exception, student: nn.Module, root: str) -> Exception:
    """An error of the choice of layers, with what to say where a method called the module that is taken for the root.

    Args:
        error: The error.
        student: The student.
        root: Name of the module.
    """
    method = calling_method(student, root)
    if not method or type(error) not in (ValueError, RuntimeError, TypeError):
        return error
    return type(error)(
        f"The root was not given, so it is {root!r}, the first trained module with others inside that was called. A "
        f"method called it: pass student_root={method!r} (then the teacher's method of that name runs, if it has one), "
        f"or call {method.partition(':')[0]!r} itself. What failed: {error}"
    )
