"""Layers that did not run in the last calls, and when that is an error or worth a warning."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import nn

from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.reading.hooks.views import why_absent
from lightning_otrt.reading.torch_internals import is_compiled

__all__ = ["Missed", "MissedLayers"]

#: After so many calls it is an error if one pair never ran, and if no pair ever ran. Layers that training skips at
#: random have run by then.
PATIENCE, PATIENCE_FOR_ALL = 32, 8
#: In place of PATIENCE, at the end of a loop or an epoch, where no layer ran in some calls alone.
FEW_CALLS = 2


class Missed(NamedTuple):
    """What to say of layers that did not run; empty where there is nothing to say, or not yet.

    Attributes:
        error: Of layers that never ran.
        warning: Of layers that ran before, and then did not for long.
    """

    error: str = ""
    warning: str = ""


class MissedLayers:
    """Counts the calls in which layers did not run, by the number of their pair."""

    def __init__(self) -> None:
        #: The layers that did not run in the last call.
        self._absent: dict[int, str] = {}
        #: The number of calls in a row in which they did not.
        self._calls: dict[int, int] = {}
        #: Whether some layer ran in one call and not in the next one: training skips layers at random.
        self._skips_some = False

    def note(self, absent: dict[int, str], *, is_first: bool) -> None:
        """Note the layers that did not run in a call.

        Args:
            absent: The layers, as errors name them.
            is_first: Whether no call came before.
        """
        if not absent and not self._absent:
            return
        self._absent = absent
        if not is_first:
            self._skips_some |= absent.keys() != self._calls.keys()
        self._calls = {index: self._calls.get(index, 0) + 1 for index in absent}

    def report(
        self,
        never: Sequence[int],
        pairs: Sequence[LayerPair],
        calls: int,
        student: nn.Module | None = None,
        *,
        is_global: bool = False,
    ) -> Missed:
        """What to say now.

        Args:
            never: The pairs that never ran on any process.
            pairs: All pairs.
            calls: The number of calls so far.
            student: The student in a call. None at the end of a loop, when there is less to wait for.
            is_global: Whether other processes have to come to the same error. Each sees its own skipped layers alone.
        """
        if not never and not self._absent:
            return Missed()
        return Missed(self._never(never, pairs, calls, student, is_global=is_global), self._lately(never))

    def _never(
        self,
        never: Sequence[int],
        pairs: Sequence[LayerPair],
        calls: int,
        student: nn.Module | None,
        *,
        is_global: bool,
    ) -> str:
        if not never:
            return ""
        if len(never) < len(pairs):
            waits = student is not None or self._skips_some or is_global
            patience = PATIENCE if waits else FEW_CALLS
        else:
            # Compiled code may lack the hooks, and then will in each call.
            patience = 1 if student is None or is_compiled(student) else PATIENCE_FOR_ALL
        if calls < patience:
            return ""
        return why_absent([self._absent.get(index, f"student layer {pairs[index].student!r}") for index in never])

    def _lately(self, never: Collection[int]) -> str:
        layers = [
            self._absent[index] for index, count in self._calls.items() if count >= PATIENCE and index not in never
        ]
        if not layers:
            return ""
        return (
            f"The {' and the '.join(layers)} did not run in the last {PATIENCE} steps, so that the share of its weight "
            "is missing from the term, as where each domain has a branch of its own. Choose a layer that runs in each "
            "step, such as its parent."
        )
