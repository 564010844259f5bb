"""A table from 128-bit keys to numbers, in sorted arrays: 24 bytes per key, and whole batches at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = ["Integers", "KeyIndex"]

#: An array of int64.
Integers = np.ndarray[Any, np.dtype[np.int64]]


class _Run(NamedTuple):
    """Entries in order of the first halves of their keys."""

    first: Integers
    second: Integers
    numbers: Integers


class KeyIndex:
    """Finds the numbers that belong to keys.

    Each insertion adds a sorted run, and runs of similar lengths are merged, so that there are about log₂ n of them,
    and an entry is moved as often. A dictionary of Python would take eight times the memory.

    Example:
        >>> import numpy as np
        >>> index = KeyIndex()
        >>> index.insert(np.array([[7, 1], [3, 2]]), np.array([10, 11]))
        >>> index.find(np.array([[3, 2], [3, 3], [7, 1]])).tolist()
        [11, -1, 10]
    """

    def __init__(self) -> None:
        self._runs: list[_Run] = []

    def insert(self, keys: Integers, numbers: Integers) -> None:
        """Add keys ``(n, 2)`` that are not there yet, with numbers ``(n,)`` that are not negative."""
        run = _sorted(keys[:, 0], keys[:, 1], numbers)
        while self._runs and len(self._runs[-1].numbers) < 2 * len(run.numbers):
            other = self._runs.pop()
            merged = [np.concatenate(parts) for parts in zip(other, run, strict=True)]
            known = merged[2] >= 0
            run = _sorted(*(part[known] for part in merged))
        self._runs.append(run)

    def find(self, keys: Integers) -> Integers:
        """The number of each key ``(n, 2)``, -1 where it is not there."""
        found = np.full(len(keys), -1, dtype=np.int64)
        for run in self._runs:
            there, where = _places(run, keys)
            found[there] = np.maximum(found[there], run.numbers[where])
        return found

    def forget(self, keys: Integers) -> None:
        """Take keys out."""
        for run in self._runs:
            _, where = _places(run, keys)
            run.numbers[where] = -1


def _sorted(first: Integers, second: Integers, numbers: Integers) -> _Run:
    # Stable: that is a merge of what is in order already.
    order = np.argsort(first, kind="stable")
    return _Run(first[order], second[order], numbers[order])


def _places(run: _Run, keys: Integers) -> tuple[Integers, Integers]:
    """Which keys are in a run, and where.

    Of two keys with the same first half (one in 4·10⁹ tables of 10⁵ keys has such) one is not found. The teacher then
    runs on that sample again.
    """
    where = np.searchsorted(run.first, keys[:, 0])
    where[where == len(run.first)] = 0
    there: Integers = np.zeros(0, dtype=np.int64)
    if len(run.first):
        (there,) = np.nonzero((run.first[where] == keys[:, 0]) & (run.second[where] == keys[:, 1]))
    return there, where[there]
