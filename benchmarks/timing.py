"""Timings on a machine that does other things too: interleaved rounds, and ratios within a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Quartiles(NamedTuple):
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        """Of a list of numbers."""
        return cls(*(float(number) for number in np.percentile(values, (25, 50, 75))))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}–{self.high:{spec}})"


def rounds(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    least: int = 5,
    most: int = 200,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Time each function once a round, one after the other, in turning order, until ``seconds`` are over.

    Args:
        functions: What to time, by name.
        seconds: Time to spend.
        least: Fewest rounds, whatever they take.
        most: Most rounds.
        clock: Seconds that a call took; default: processor time.

    Returns:
        Seconds by name, the first round (a warm-up) left out.
    """
    clock = clock or processor_clock
    names = list(functions)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        functions[name]()
    start = time.perf_counter()
    for number in range(most):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(clock(functions[name]))
        if number + 1 >= least and time.perf_counter() - start > seconds:
            break
    return taken


def ratios(taken: Mapping[str, list[float]], of: str, to: str) -> Quartiles:
    """Quartiles of time ``of`` over time ``to``, round by round."""
    return Quartiles.of([a / b for a, b in zip(taken[of], taken[to], strict=True)])


def processor_clock(function: Callable[[], object]) -> float:
    """Processor seconds of a call: with one thread the wall time of an idle machine, without what others take of it."""
    start = time.process_time()
    function()
    return time.process_time() - start


def wall_clock(function: Callable[[], object]) -> float:
    """Seconds of a call by the clock on the wall."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
