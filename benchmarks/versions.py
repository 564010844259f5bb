"""Compares the speed of two versions: ``python -m benchmarks.versions --before PATH``, a checkout of the older one.

Both versions are timed in subprocesses that take turns, so that what else the machine does reaches both alike. Ratios
are taken within each round. Times are processor time of one thread, of forward and backward of the term of one pair.
Writes ``results/versions.json`` and the page ``results/two_versions.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import write_page
from benchmarks.problems import COSTS
from benchmarks.timing import Quartiles

HERE = Path(__file__).parent
SHAPES = ((128, 128, 512), (512, 512, 256), (1024, 512, 512))
CLOUD = "independent"
KINDS = ("first call", "cold", "warm", "between", "between, memory 0.98")
#: Least ratio of a rival's time to that of a cold solve, and largest ratio of new to old time.
RIVAL, NO_WORSE = 2.0, 1.05


def run(checkout: Path, cases: list[Any]) -> list[dict[str, Any]]:
    """What the worker measures in a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-", json.dumps(cases)]
    # Read from standard input: as a file, the worker would put the folder that it lies in before the checkout.
    with (HERE / "versions_worker.py").open() as worker:
        done = subprocess.run(
            command, stdin=worker, cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"The benchmark failed in {checkout.name}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def commit(checkout: Path) -> str:
    """The short hash of what is checked out."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def compare(before: Path, count: int, seconds: float) -> list[dict[str, Any]]:
    """One row a case, with quartiles over rounds."""
    cases = [(shape, CLOUD, cost, seconds) for shape in SHAPES for cost in COSTS]
    checkouts = {"before": before, "after": HERE.parent}
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in checkouts}
    for number in range(count):
        for name in list(checkouts)[:: 1 if number % 2 else -1]:
            found[name].append(run(checkouts[name], cases))
        print(f"round {number + 1} of {count}", flush=True)
    rows = []
    for place, (shape, _, cost, _) in enumerate(cases):
        old, new = ([measured[place] for measured in found[name]] for name in checkouts)
        row: dict[str, Any] = {"shape": shape, "cost": cost}
        for kind in KINDS:
            times = [(a["milliseconds"][kind], b["milliseconds"][kind]) for a, b in zip(old, new, strict=True)]
            row[kind] = {
                "before": Quartiles.of([a for a, _ in times]),
                "after": Quartiles.of([b for _, b in times]),
                "ratio": Quartiles.of([b / a for a, b in times]),
            }
        for name, measured in (("before", old), ("after", new)):
            rival = [part["milliseconds"]["SamplesLoss"] / part["milliseconds"]["cold"] for part in measured]
            row[f"SamplesLoss / cold, {name}"] = Quartiles.of(rival)
            row[f"marginal error, {name}"] = measured[0]["marginal error"]
            row[f"value error, {name}"] = measured[0]["value error"]["ours"]
        rows.append(row)
    return rows


def report(results: dict[str, Any]) -> str:
    """The page of results."""
    rows = results["rows"]
    lines = [
        "# Two versions",
        "",
        f"`{results['command']}`: {results['before']} (before) and {results['after']} (after) on {results['machine']}, "
        f"torch {results['torch']}, one thread, {results['rounds']} rounds of subprocesses that take turns. Processor "
        f"time of forward and backward of one pair, {CLOUD} neurons, ε = 0.01; ratios are after over before, median "
        "(quartiles) of the rounds. A *cold* solve has no potential to start from; the *first call* of a run also "
        "checks its batch. *SamplesLoss* is GeomLoss' loss, tuned to a value within 1 % of the exact one. The marginal "
        "error is the L1 distance of the teacher's masses from uniform ones after a cold solve.",
        "",
        "| problem | first call | cold | cold, ms | warm | between solves | with memory 0.98 "
        "| SamplesLoss / cold, before | after | marginal error, before | after |",
        f"|---|{'---|' * 10}",
    ]
    for row in rows:
        n, m, observations = row["shape"]
        cells = [
            f"({n if n == m else f'{n}×{m}'}, {observations}) {row['cost']}",
            *(f"{row[kind]['ratio']:.2f}" for kind in KINDS[:2]),
            f"{row['cold']['after'].median:.1f}",
            *(f"{row[kind]['ratio']:.2f}" for kind in KINDS[2:]),
            *(f"{row[f'SamplesLoss / cold, {name}']:.1f}" for name in ("before", "after")),
            *(f"{row[f'marginal error, {name}']:.3f}" for name in ("before", "after")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    medians = {kind: Quartiles.of([row[kind]["ratio"].median for row in rows]).median for kind in KINDS}
    rival = Quartiles.of([row["SamplesLoss / cold, after"].median for row in rows])
    worst = max(medians[kind] for kind in KINDS[2:])
    reached = sum(row["SamplesLoss / cold, after"].median >= RIVAL for row in rows)
    lines += [
        "",
        f"Median over the problems: {', '.join(f'{kind} {ratio:.2f}' for kind, ratio in medians.items())}. Warm solves "
        f"and calls between solves must not exceed {NO_WORSE:g}: {'pass' if worst <= NO_WORSE else '**fail**'}. "
        f"SamplesLoss takes {rival:.1f} times as long as a cold solve; at least {RIVAL:g} times as long is asked for, "
        f"which {reached} of {len(rows)} problems reach.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout of the version to compare with")
    parser.add_argument("--rounds", type=int, default=7, help="subprocesses of each version")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each case in each of them")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "command": "python -m benchmarks.versions --before PATH",
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "before": commit(arguments.before),
        "after": commit(HERE.parent),
        "rounds": arguments.rounds,
        "rows": compare(arguments.before.resolve(), arguments.rounds, arguments.seconds),
    }
    text = report(results)
    print(text)
    (HERE / "results" / "versions.json").write_text(json.dumps(results, indent=1) + "\n")
    write_page(text)


if __name__ == "__main__":
    main()
