"""Warnings that point at the user's code, warnings that are given once, and errors that may be warnings."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import torch
from lightning_utilities.core.rank_zero import rank_zero_only

__all__ = ["Notices", "TransferWarning", "rank_zero_warn", "warn"]

#: Packages that call each other between a line of the user and a warning: a forward calls hooks, `with` a generator.
_BETWEEN = frozenset(
    {
        "contextlib",
        "lightning",
        "lightning_fabric",
        "lightning_otrt",
        "lightning_utilities",
        "pytorch_lightning",
        "torch",
        "torchmetrics",
    }
)


class TransferWarning(UserWarning):
    """The category of all warnings of this package, for filters.

    Example:
        >>> import warnings
        >>> from lightning_otrt import TransferWarning
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", TransferWarning)  # a script that must not go on
        ...     warnings.warn("Layer 'block3' of the student has 12 dead neurons.", TransferWarning)
        Traceback (most recent call last):
        lightning_otrt.notices.TransferWarning: Layer 'block3' of the student has 12 dead neurons.
    """


def warn(message: str) -> None:
    """Give a warning that points at the line of the user that led to it, such as the call of a network.

    Python can do so by itself since 3.12 (``skip_file_prefixes``).

    Args:
        message: The warning.
    """
    if torch.compiler.is_compiling():  # Dynamo cannot follow frames
        warnings.warn(message, TransferWarning, stacklevel=2)
        return
    level, frame = 1, inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, TransferWarning, stacklevel=level)


@rank_zero_only
def rank_zero_warn(message: str) -> None:
    """:func:`warn`, on the first process of a run alone."""
    warn(message)


class Notices:
    """What one object has to tell its user.

    Args:
        strict: Whether :meth:`fail` raises.
        tell: Gives a warning.

    Example:
        >>> import warnings
        >>> notices = Notices(strict=False)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     notices.warn("The batch is small.")
        ...     notices.warn("The batch is small.")
        ...     notices.fail(ValueError("No term."), otherwise="There is no term, because of strict=False.")
        >>> [str(warning.message) for warning in caught]
        ['The batch is small.', 'There is no term, because of strict=False.']
    """

    def __init__(self, *, strict: bool = True, tell: Callable[[str], None] = warn) -> None:
        self.strict, self._tell = strict, tell
        self._told: set[str] = set()

    def warn(self, message: str, key: str = "") -> None:
        """Give a warning, once.

        Args:
            message: The warning.
            key: What it is about, where the message differs from call to call.
        """
        if (key or message) not in self._told:
            self._told.add(key or message)
            self._tell(message)

    def fail(self, error: Exception, *, otherwise: str, key: str = "") -> None:
        """Raise an error if ``strict``, else give a warning once.

        Args:
            error: The error.
            otherwise: The warning.
            key: See :meth:`warn`.
        """
        if self.strict:
            raise error
        self.warn(otherwise, key)
