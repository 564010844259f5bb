"""Processor time of a training step, by networks and method."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import replace

from benchmarks.evidence.experiments import Experiment
from benchmarks.evidence.runs import Results, Row, Run, complete
from benchmarks.evidence.tuning import SEEDS
from benchmarks.real.methods import METHODS
from benchmarks.real.training import execute

#: The file of runs that were made for their time alone, and the number of their steps.
TIMES = "step_times.jsonl"
STEPS = 40


def timed_runs(cell: Experiment) -> list[Run]:
    """One short run of each student of a cell. Learning rate and weight do not change what a step costs."""
    students = [method for method in cell.methods if not METHODS[method].freeze]
    return [replace(cell.tuning.runs(method, SEEDS[0])[0], steps=STEPS) for method in students]


def measure_steps(cell: Experiment, results: Results) -> None:
    """Time a step of each method of a cell on one thread of the CPU, where it is not known yet."""
    complete(timed_runs(cell), results, execute, title=f"steps of {cell.title}")


def step_times(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """Median milliseconds of a step by networks and method, over the runs on a CPU."""
    times: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if "step_ms" in row:
            times.setdefault((row["pair"], row["method"]), []).append(row["step_ms"])
    return {key: statistics.median(values) for key, values in times.items()}
