"""Plain Python in place of compiled code, for as long as anybody needs it."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import ClassVar

import torch

__all__ = ["EagerCode"]


class EagerCode:
    """While one of these objects holds, ``torch.compile`` runs plain Python in the whole process.

    ``torch.compiler.set_stance`` restores what it found. Two users that end in another order than they began would
    leave compilation off, so the first that holds sets it, and the last that releases restores it.

    Example:
        >>> first, second = EagerCode(), EagerCode()
        >>> first.hold(), second.hold(), first.release(), second.release()
        (None, None, None, None)
    """

    _holders: ClassVar[int] = 0
    _restore: ClassVar[ExitStack] = ExitStack()

    def __init__(self) -> None:
        self._holds = False

    def __getstate__(self) -> dict[str, bool]:
        """A copy holds nothing: its release would end what the original holds."""
        return {"_holds": False}

    def hold(self) -> None:
        """Begin. Without effect where Dynamo was never imported: nothing is compiled then."""
        if self._holds or "torch._dynamo" not in sys.modules:
            return
        if not EagerCode._holders:
            self._restore.enter_context(torch.compiler.set_stance("force_eager"))
        EagerCode._holders += 1
        self._holds = True

    def release(self) -> None:
        """End, if it holds."""
        if not self._holds:
            return
        self._holds = False
        EagerCode._holders -= 1
        if not EagerCode._holders:
            self._restore.close()
