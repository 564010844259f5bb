"""Plain values that a forward may change in place: arrays, and attributes in slots."""

from __future__ import annotations

import array
from collections.abc import Callable, Iterator
from types import MemberDescriptorType
from typing import Any

import numpy as np

__all__ = ["BYTES", "keep_array", "keep_bytes", "slot_names", "slots"]

#: Arrays of the standard library.
BYTES = (bytearray, array.array)


def keep_array(value: np.ndarray[Any, Any]) -> Callable[[], None] | None:
    """Sets the elements of an array back; None for one that cannot be written to, or is a file."""
    if not value.flags.writeable or isinstance(value, np.memmap):
        return None
    saved = np.array(value, subok=False)

    def undo() -> None:
        now = value.view(np.ndarray)
        if now.shape == saved.shape:
            np.copyto(now, saved)

    return undo


def keep_bytes(value: bytearray | array.array[Any]) -> Callable[[], None]:
    """Sets the items of an array of the standard library back."""
    saved: Any = value[:]

    def undo() -> None:
        if value != saved:
            value[:] = saved

    return undo


def slot_names(kind: type) -> list[str]:
    """The names of attributes that are kept outside of ``__dict__``. Compiled code can ask for them.

    Example:
        >>> class Point:
        ...     __slots__ = ("x", "__weakref__")
        >>> slot_names(Point)
        ['x']
    """
    found = [getattr(base, "__slots__", ()) for base in kind.__mro__ if base.__module__ != "builtins"]
    names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
    return [name for name in names if not name.startswith("__")]


def slots(value: object) -> Iterator[MemberDescriptorType]:
    """The descriptors of attributes that are kept outside of ``__dict__``.

    Example:
        >>> class Point:
        ...     __slots__ = ("x", "y")
        >>> [slot.__name__ for slot in slots(Point())]
        ['x', 'y']
    """
    for kind in type(value).__mro__:
        if "__slots__" in vars(kind):  # types that are written in C have such descriptors for other things
            yield from (slot for slot in vars(kind).values() if isinstance(slot, MemberDescriptorType))
