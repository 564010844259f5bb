"""Checks of arguments that several places take; each error names the argument and what it got."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

__all__ = [
    "check_callable",
    "check_count",
    "check_decay",
    "check_flag",
    "check_module",
    "check_number",
    "check_seed",
    "is_int",
]


def is_int(value: Any) -> bool:
    """Whether ``value`` is an integer. A boolean is not one here."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Expected argument `{name}` to be a number, but got {type(value).__name__}.")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"Expected argument `{name}` to be finite and not negative, but got {value}.")


def check_count(name: str, value: Any, *, optional: bool = False) -> None:
    """Raise a ValueError unless ``value`` is a positive integer, or None where it is ``optional``."""
    if optional and value is None:
        return
    if not is_int(value) or value < 1:
        or_none = " or None" if optional else ""
        raise ValueError(f"Expected argument `{name}` to be a positive integer{or_none}, but got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raise a TypeError unless ``value`` is a boolean."""
    if not isinstance(value, bool):
        raise TypeError(f"Expected argument `{name}` to be True or False, but got {value!r}.")


def check_seed(name: str, value: Any) -> None:
    """Raise a TypeError unless ``value`` is an integer."""
    if not is_int(value):
        raise TypeError(f"Expected argument `{name}` to be an integer, but got {value!r}.")


def check_callable(name: str, value: Any) -> None:
    """Raise a TypeError unless ``value`` can be called or is None."""
    if value is not None and not callable(value):
        raise TypeError(f"Expected argument `{name}` to be callable, but got {type(value).__name__}.")


def check_module(name: str, value: Any) -> None:
    """Raise a TypeError unless ``value`` is a PyTorch module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"Expected argument `{name}` to be a torch.nn.Module, but got {type(value).__name__}.")


def check_decay(name: str, value: Any) -> None:
    """Raise a ValueError unless ``value`` is "auto" or the decay of a running mean."""
    if value == "auto":
        return
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(
            f'Expected argument `{name}` to be "auto" or a decay in [0, 1), such as 0.98, but got {value!r}. '
            '`plan="static"` keeps one plan from everything seen.'
        )
