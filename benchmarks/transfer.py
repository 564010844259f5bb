"""Does representation transfer help, when, and against what? Without download, on glyphs and handwritten digits.

``python -m benchmarks.transfer`` runs everything that is missing in ``results/evidence.jsonl`` and writes the page
``results/transfer.md``; ``--quick`` shows within minutes that everything works, and writes to ``outputs`` alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.evidence.experiments import EXPERIMENTS, QUICK, Experiment, quick
from benchmarks.evidence.runs import Results, Run, complete
from benchmarks.evidence.section import section
from benchmarks.evidence.training import CACHE, execute
from benchmarks.evidence.tuning import tune
from benchmarks.pages import write_page

RESULTS = Path(__file__).parent / "results" / "evidence.jsonl"


def run(name: str, experiment: Experiment, results: Results, processes: int) -> None:
    """Tune, then run what is missing."""

    def go(runs: Sequence[Run], title: str) -> None:
        complete(runs, results, execute, processes=processes, title=f"{name}, {title}")

    choices = tune(experiment.tuning, experiment.tuned_methods(), results, go)
    go(experiment.runs(choices), "runs")


def selected(
    names: Sequence[str], *, seeds: int | None, per_class: Sequence[int] | None, is_quick: bool
) -> dict[str, Experiment]:
    """Experiments by name, with fewer seeds, points of a curve or steps where that is asked for."""
    chosen = {name: EXPERIMENTS[name] for name in names}
    if is_quick:
        chosen = {name: quick(experiment) for name, experiment in chosen.items()}
    if seeds is not None:
        chosen = {name: replace(experiment, seeds=min(seeds, experiment.seeds)) for name, experiment in chosen.items()}
    if per_class is not None:
        chosen = {
            name: replace(experiment, per_class=tuple(count for count in experiment.per_class if count in per_class))
            for name, experiment in chosen.items()
        }
    return chosen


def report(results: Results, experiments: Mapping[str, Experiment], *, measured: bool) -> None:
    """Write the page and its figures beside the rows."""
    folder = results.path.parent
    print(f"Report: {write_page(section(results, folder, experiments), folder, measured=measured)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, each on one core")
    parser.add_argument("--seeds", type=int, help="fewer paired seeds; a later command adds the others")
    parser.add_argument("--per-class", type=int, nargs="+", help="some points of a curve; a later command adds others")
    parser.add_argument(
        "--quick", action="store_true", help="a few short runs of everything, five minutes on two cores"
    )
    parser.add_argument("--report", action="store_true", help="write the report from what is there, run nothing")
    parser.add_argument("--folder", type=Path, help="where rows and figures go; default: results, quick: outputs")
    options = parser.parse_args(arguments)
    folder = options.folder or (CACHE / "quick" if options.quick else RESULTS.parent)
    results = Results(folder / RESULTS.name)
    is_new = not results.rows  # else some rows may be of earlier code
    chosen = selected(
        options.experiments or (QUICK if options.quick else list(EXPERIMENTS)),
        seeds=options.seeds,
        per_class=options.per_class,
        is_quick=options.quick,
    )
    if not options.report:
        for name, experiment in chosen.items():
            run(name, experiment, results, options.processes)
    everything = {name: quick(experiment) for name, experiment in EXPERIMENTS.items()} if options.quick else EXPERIMENTS
    report(results, everything, measured=is_new and not options.report)


if __name__ == "__main__":
    main()
