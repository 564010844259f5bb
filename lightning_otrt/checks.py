"""Checks of arguments that several files need. Each error names the argument and the value it got."""

from __future__ import annotations

import inspect
import math
from numbers import Real
from typing import Any

from torch import nn

__all__ = [
    "check_callable",
    "check_count",
    "check_decay",
    "check_flag",
    "check_module",
    "check_name",
    "check_number",
    "check_seed",
    "constructor_call",
    "is_int",
    "shown",
]

#: Characters of a value in an error.
_LONGEST = 100


def is_int(value: Any) -> bool:
    """Whether ``value`` is an integer. A boolean is not one here."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(name: str, value: Any, hint: str = "") -> None:
    """Check that an argument is a finite number that is not negative.

    Args:
        name: Name of the argument.
        value: What was passed.
        hint: A sentence that ends the error: what the argument means, or what to pass.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's numbers are such, too
        raise TypeError(_expected(name, "a number", _typed(value), hint))
    if not math.isfinite(value) or value < 0:
        raise ValueError(_expected(name, "finite and not negative", str(value), hint))


def check_count(name: str, value: Any, hint: str = "", *, optional: bool = False) -> None:
    """Check that an argument is a positive integer, or None where it is ``optional``.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is below 1.
    """
    if optional and value is None:
        return
    wanted = f"a positive integer{' or None' if optional else ''}"
    if not is_int(value):
        raise TypeError(_expected(name, wanted, _typed(value), hint))
    if value < 1:
        raise ValueError(_expected(name, wanted, str(value), hint))


def check_flag(name: str, value: Any, hint: str = "") -> None:
    """Raise a ``TypeError`` unless an argument is True or False."""
    if not isinstance(value, bool):
        raise TypeError(_expected(name, "True or False", _typed(value), hint))


def check_seed(name: str, value: Any, hint: str = "") -> None:
    """Raise a ``TypeError`` unless an argument is an integer."""
    if not is_int(value):
        raise TypeError(_expected(name, "an integer", _typed(value), hint))


def check_callable(name: str, value: Any, hint: str = "") -> None:
    """Raise a ``TypeError`` unless an argument can be called or is None."""
    if value is not None and not callable(value):
        raise TypeError(_expected(name, "callable", _typed(value), hint))


def check_name(name: str, value: Any, hint: str = "") -> None:
    """Raise a ``TypeError`` unless an argument is a string or None."""
    if value is not None and not isinstance(value, str):
        raise TypeError(_expected(name, "a string or None", _typed(value), hint))


def check_module(name: str, value: Any) -> None:
    """Raise a ``TypeError`` unless an argument is a PyTorch module."""
    if not isinstance(value, nn.Module):
        raise TypeError(_expected(name, "a torch.nn.Module", type(value).__name__, ""))


def check_decay(name: str, value: Any, hint: str = "") -> None:
    """Raise a ``ValueError`` unless an argument is ``"auto"`` or the decay of a running mean, in [0, 1)."""
    if value == "auto":
        return
    if isinstance(value, (bool, str)) or not isinstance(value, Real) or not 0 <= float(value) < 1:
        raise ValueError(_expected(name, '"auto" or a decay in [0, 1), such as 0.98', repr(value), hint))


def _expected(name: str, wanted: str, got: str, hint: str) -> str:
    return f"Expected argument `{name}` to be {wanted}, but got {got}.{' ' if hint else ''}{hint}"


def shown(value: Any) -> str:
    """The ``repr`` of what a user passed, for errors; of long ones, such as weights, only the type.

    Example:
        >>> shown([1, 2]), shown(list(range(1000)))
        ('[1, 2]', 'a list')
    """
    text = repr(value)
    name = type(value).__name__
    return text if len(text) <= _LONGEST else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def constructor_call(value: Any) -> str:
    """The call that made an object, for its ``repr``. The arguments are its attributes; defaults are left out.

    Example:
        >>> from lightning_otrt.schedules import CosineDecay
        >>> constructor_call(CosineDecay(100)), constructor_call(CosineDecay(100, final=0.5))
        ('CosineDecay(100)', 'CosineDecay(100, final=0.5)')
    """
    arguments = []
    for name, parameter in inspect.signature(type(value)).parameters.items():
        given = getattr(value, name)
        if parameter.default is inspect.Parameter.empty:
            arguments.append(repr(given))
        elif given != parameter.default:
            arguments.append(f"{name}={given!r}")
    return f"{type(value).__name__}({', '.join(arguments)})"


def _typed(value: Any) -> str:
    """The value with its type, as ``3`` and ``"3"`` may look alike in a message. Long values are left out."""
    text = repr(value)
    return f"{text if len(text) <= _LONGEST else 'an object'} of type {type(value).__name__}"
