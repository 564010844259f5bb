"""Do the stored accuracies hold on the code as it is? ``python -m benchmarks.repeat`` trains a sample of them again.

The tables of accuracies take days of computing, this takes an hour or two. It draws runs at random, without a look at
their results, from all test runs on a CPU with a plan of this library or its control. Those of real checkpoints need
what ``benchmarks.real`` needs. Rows go to ``results/repeated.jsonl``, and what is there is not run again.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import transfer
from benchmarks.evidence import methods as letters
from benchmarks.evidence import training
from benchmarks.evidence.runs import Results, Row, Run, complete
from benchmarks.evidence.statistics import Estimate, estimate
from benchmarks.pages import RESULTS, write_page
from benchmarks.real import methods as checkpoints
from benchmarks.real.__main__ import ALL
from benchmarks.real.__main__ import RESULTS as REAL
from benchmarks.real.training import execute

#: Rows of this benchmark.
REPEATED = "repeated.jsonl"
#: Stored accuracies have three decimals; two that differ by less are equal.
_EQUAL = 5e-4


@dataclass(frozen=True)
class Group:
    """Stored runs that one function trains.

    Attributes:
        title: Its name in the table.
        methods: All methods by name.
        stored: Their rows.
        execute: From a run to its result.
    """

    title: str
    methods: Mapping[str, letters.Method]
    stored: Sequence[Row]
    execute: Callable[[Run], Row]

    def draw(self, count: int, seed: int) -> dict[Run, float]:
        """Accuracies of so many runs in random order; those of a larger count begin with those of a smaller one."""
        found = {Run.of(row): row["accuracy"] for row in self.stored if "device" not in row}
        methods = {name for name, method in self.methods.items() if method.ours or method.control}
        runs = [run for run in found if run.split == "test" and run.method in methods]
        random.Random(seed).shuffle(runs)
        return {run: found[run] for run in runs[:count]}


def groups() -> list[Group]:
    """Letters and digits, then real checkpoints."""
    real = [row for name in ALL for row in Results(REAL / f"{name}.jsonl").rows.values()]
    return [
        Group("letters and digits", letters.METHODS, [*Results(transfer.RESULTS).rows.values()], training.execute),
        Group("real checkpoints", checkpoints.METHODS, real, execute),
    ]


def changes(stored: Mapping[Run, float], now: Results) -> dict[Run, float]:
    """Accuracy now less the stored one, in points, of the runs that were run again."""
    return {run: now[run]["accuracy"] - accuracy for run, accuracy in stored.items() if run in now}


def _line(title: str, values: Sequence[float]) -> str:
    if not values:
        return f"| {title} | 0 | | | |"
    equal = sum(abs(value) < _EQUAL for value in values)
    return f"| {title} | {len(values)} | {equal} | {_signed(estimate(values))} | {max(map(abs, values)):.1f} |"


def _signed(found: Estimate) -> str:
    return f"{found.mean:+.2f}" + ("" if math.isnan(found.half_width) else f" ± {found.half_width:.2f}")


def section(found: Iterable[tuple[Group, Mapping[Run, float]]]) -> str:
    """The page, from the changes of each group."""
    lines = []
    for group, values in found:
        lines.append(_line(f"**{group.title}**", [*values.values()]))
        for is_control, title in ((False, "solved plans"), (True, "controls")):
            if part := [value for run, value in values.items() if group.methods[run.method].control == is_control]:
                lines.append(_line(title, part))
    return "\n".join(
        [
            "# Repeated runs",
            "",
            "`python -m benchmarks.repeat`. Tables of accuracies were measured over many commits. Runs that were drawn "
            "from them at random, without a look at their results, are trained again here on the code as it is: "
            "accuracy now less that of the table, in points, with the 95 % interval of the mean. The interval says how "
            "far the tables may be off, on average. It is a little narrow, since some runs share a teacher. Single "
            "runs differ: another processor, or another order of operations, rounds otherwise, and a run may end "
            "points away.",
            "",
            "| runs | count | equal | mean change | largest change |",
            "|---|---|---|---|---|",
            *lines,
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, run what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="runs of letters and digits; of real ones half as many")
    parser.add_argument("--seed", type=int, default=0, help="another draw")
    parser.add_argument("--report", action="store_true", help="write the report from what is there, run nothing")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the page and its rows go")
    options = parser.parse_args(arguments)
    now = Results(options.folder / REPEATED)
    is_new = not now.rows  # else some rows may be of earlier code
    found = []
    for group, count in zip(groups(), (options.count, options.count // 2), strict=True):
        stored = group.draw(count, options.seed)
        if not options.report:
            complete(stored, now, group.execute, title=group.title)
        found.append((group, changes(stored, now)))
    print(f"Report: {write_page(section(found), options.folder, measured=is_new)}")


if __name__ == "__main__":
    main()
