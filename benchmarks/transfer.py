"""Does representation transfer help, when, and against what: ``python -m benchmarks.transfer``."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.evidence.experiments import EXPERIMENTS
from benchmarks.evidence.runs import Results, complete
from benchmarks.evidence.training import execute
from benchmarks.evidence.tuning import tune

RESULTS = Path(__file__).parent / "results" / "evidence.jsonl"


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    results = Results(RESULTS)
    for name in options.experiments:
        experiment = EXPERIMENTS[name]

        def go(runs, title, name=name):
            complete(runs, results, execute, processes=options.processes, title=f"{name}, {title}")

        choices = tune(experiment.tuning, experiment.tuned_methods(), results, go)
        go(experiment.runs(choices), "runs")


if __name__ == "__main__":
    main()
