"""Warnings that are given once, and errors that are warnings where a user wants no error."""

from __future__ import annotations

import warnings

__all__ = ["Notices"]


class Notices:
    """What one object has to tell its user.

    Args:
        strict: Whether :meth:`fail` raises.

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

    def __init__(self, *, strict: bool = True) -> None:
        self.strict = strict
        self._told: set[str] = set()

    def warn(self, message: str, key: str = "") -> None:
        """Give a warning, once.

        Args:
            message: The warning.
            key: What it is about, where the message differs from call to call.
        """
        if (key or message) not in self._told:
            self._told.add(key or message)
            warnings.warn(message, stacklevel=3)

    def fail(self, error: Exception, *, otherwise: str, key: str = "") -> None:
        """Raise an error if ``strict``, else give a warning once.

        Args:
            error: The error.
            otherwise: The warning.
            key: See :meth:`warn`.
        """
        if self.strict:
            raise error
        if (key or otherwise) not in self._told:
            self._told.add(key or otherwise)
            warnings.warn(otherwise, stacklevel=3)
