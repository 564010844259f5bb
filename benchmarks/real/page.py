"""The page ``results/real_checkpoints.md``: protocol, networks, one table for each cell, what was not run."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from benchmarks.evidence.experiments import Experiment
from benchmarks.evidence.goals import goals_table
from benchmarks.evidence.report import Found, gather, p_value, signed
from benchmarks.evidence.runs import Results
from benchmarks.evidence.statistics import Comparison, estimate
from benchmarks.real.cells import CELLS, label
from benchmarks.real.comparisons import RECIPE, accuracies, best_student, comparisons_of, goals
from benchmarks.real.confirmations import CONFIRMATIONS, TakenOver
from benchmarks.real.methods import CONTROLS, METHODS, PLAIN
from benchmarks.real.networks_table import NETWORKS, table
from benchmarks.real.overview import Tests, counts, overview
from benchmarks.real.step_times import TIMES, step_times

_PROTOCOL = """\
Teachers are ImageNet's EfficientNet-Lite0 and the sentence encoder all-MiniLM-L6-v2, frozen, as they come; students
start from scratch (or, where a heading says "itself", as a copy of the teacher with a new head). Emoji that are tested
are in no training or validation set, in either drawing; five emoji per class are ten labelled pictures. Of the 22 other
subcategories seven of 584 test pictures are equal to one of training (silhouettes of families), for all methods alike.
Images are 64 × 64, texts 48 tokens.

- *Tuned alike*: twelve candidates for each method (four learning rates × three weights; three weight decays where there
  is no weight; six penalties of a ridge head), the best two again on a second seed (of equal ones the first of the
  grid), on validation samples of the same cell and with half the steps of its runs. Where distillation stands beside a
  transfer term, the weight of that term is tuned and distillation has weight 1.
- *Paired*: within a seed all methods have the same samples, initial weights, order of batches and dropout. Intervals
  are 95 % of Student's t over seeds. The p values of a table are those of paired t tests, corrected by Holm's procedure
  over all tests of that table.
- *The same layers for all*: those that `layers="auto"` chooses. FitNets and CKA see maps averaged to 4 × 4, as the
  transport term does, and valid tokens alone.
- *Distillation* is that of the library: with other classes the teacher's output regressed on what enters the student's
  head. *Controls* are a fixed random assignment, or rotation, in place of the one that is solved.
- *Cost* is the processor time of a training step on one thread of a CPU, with the teacher's outputs at hand
  (`teacher_cache`): the median over all tuned cells of the same two networks that ran on a CPU (else over the others),
  or one run of 40 steps where none did (`--times`). They ran on several days and processors, beside other jobs.
  Without a cache the teacher's forward comes on top: its time for a batch of 32 is in the first table. Each image has
  eight fixed views.
- The frozen teacher with a ridge head is no student: it costs what the teacher costs."""

_ALL = """\
Mean accuracies in %, the best student in bold (where no column has it, it is the one that the last column names).
*logits* is distillation alone, *rotation* `plan="orthogonal"`, *recipe* that with distillation, *control* a random
rotation with distillation, *frozen teacher* a linear head on its features, which is no student. Differences have 95 %
intervals, and p values (Holm) where these are below 0.05. All intervals are in the tables of the cells."""
_TUNED = "Tuned on validation samples of the same cell."
_NOT_TUNED = "Nothing was tuned: options of another cell."

_CONFIRMED = """\
Other data, other classes, twice as many classes, another teacher, and more labels. Weight, learning rate and weight
decay of each method are those that another cell has tuned on its own data; it is named below each table."""


def page(results: Mapping[str, Results], cells: Mapping[str, Experiment], folder: Path) -> str:
    """The Markdown of everything found so far.

    Args:
        results: Rows of each cell.
        cells: What was planned.
        folder: Where the rows lie.
    """
    found = {name: one for cell in cells for name, one in gather(results[cell], {cell: cells[cell]}).items()}
    rows = [row for one in results.values() for row in one.rows.values()]
    hours = sum(row["seconds"] for row in rows) / 3600
    lines = [
        "# Real checkpoints",
        "",
        f"`python -m benchmarks.real` on {platform.machine()}, torch {torch.__version__.partition('+')[0]}, one "
        f"thread, or with `--device cuda` on the GPU that a cell names: {len(rows)} runs, {hours:.1f} hours. Each run "
        f"is a line of a file in `{folder.name}`; the command continues where it was stopped.",
        "",
        _PROTOCOL,
        "",
        *table(folder / NETWORKS),
    ]
    tests = {name: comparisons_of(accuracies(one)) for name, one in found.items()}
    lines += _overview(found, tests)
    lines += _goals("Goals on real checkpoints", f"The recipe is {label(RECIPE)}.", found, tests, CELLS)
    lines += _goals("The same goals on tasks where nothing was tuned", _CONFIRMED, found, tests, CONFIRMATIONS)
    tuned = [row for name, one in results.items() if name in CELLS for row in one.rows.values()]
    times = step_times(Results(folder / TIMES).rows.values()) | step_times(rows) | step_times(tuned)
    for name, one in found.items():
        command = f"python -m benchmarks.real --cells {name}"
        lines += [f"## {one.experiment.title}", "", f"`{command}{_device(one)}", ""]
        lines += [*cell_table(one, tests[name], times), *_other_runs(one), *_choices(one)]
    if missing := _missing(found, cells):
        lines += ["## Cells not tuned, or not complete", "", *missing, ""]
    return "\n".join(lines)


def _goals(
    heading: str,
    text: str,
    found: Mapping[str, Found],
    tests: Tests,
    cells: Iterable[str],
) -> list[str]:
    """The table of goals of some cells, those that are complete."""
    reached = [goal for name, one in _complete(found, cells).items() for goal in goals(one, tests[name])]
    return [f"## {heading}", "", text, "", *goals_table(reached)] if reached else []


def _complete(found: Mapping[str, Found], cells: Iterable[str]) -> dict[str, Found]:
    """Those cells that have all their runs."""
    return {name: found[name] for name in cells if name in found and not _missing_seeds(found[name])}


def _overview(found: Mapping[str, Found], tests: Tests) -> list[str]:
    """One row for each cell that is complete: those that were tuned, then the others."""
    lines = ["## All cells", "", _ALL, ""]
    for heading, cells in ((_TUNED, CELLS), (_NOT_TUNED, CONFIRMATIONS)):
        if complete := _complete(found, cells):
            lines += [f"{heading} {counts(complete, tests)}", "", *overview(complete, tests), ""]
    return lines


def _device(found: Found) -> str:
    """The end of a cell's command, and the devices that its runs name."""
    rows = found.results.rows.values()
    devices = dict.fromkeys(row["device"] for row in rows if "device" in row)
    on_cpu = sum("device" not in row for row in rows)
    names = [*devices, *([f"{on_cpu} runs on a CPU"] if on_cpu else [])]
    return f" --device cuda` ({'; '.join(names)})" if devices else "`"


def cell_table(
    found: Found, tests: Mapping[tuple[str, str], Comparison], times: Mapping[tuple[str, str], float]
) -> list[str]:
    """Accuracy, gains over plain training and over the control, and cost of each method."""
    values = accuracies(found)
    best = best_student(values)
    seeds = sorted({len(of_seed) for of_seed in values.values()})
    lines = [
        f"{'–'.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} paired seeds; the best student is in bold.",
        "",
        "| method | accuracy, % | over plain, points | p (Holm) | over its control, points | p (Holm) | step, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of_seed in values.items():
        cells = [label(name), str(estimate(list(of_seed.values())))]
        if name == best:
            cells = [f"**{cell}**" for cell in cells]
        for other in (PLAIN, CONTROLS.get(name, "")):
            one = tests.get((name, other))
            cells += ["", ""] if one is None else [signed(one.gain), p_value(one.corrected)]
        time = times.get((str(found.experiment.changes.get("pair", found.experiment.tuning.pair)), name))
        lines.append(f"| {' | '.join([*cells, '' if time is None else f'{time:.0f}'])} |")
    return [*lines, ""]


def _other_runs(found: Found) -> list[str]:
    """How many rows on test samples are in no table: those of an earlier plan."""
    tests = sum(row.get("split", "test") == "test" for row in found.results.rows.values())
    shown = sum(len(of_seed) for of_seed in accuracies(found).values())
    return (
        [f"{tests - shown} more runs, of an earlier plan, are in the file and in no table.", ""]
        if tests > shown
        else []
    )


def _choices(found: Found) -> list[str]:
    """What tuning chose; a star marks a learning rate at the edge of its candidates."""
    where = f" in `{found.experiment.tuning.cell}`" if isinstance(found.experiment.tuning, TakenOver) else ""
    lines = [f"<details><summary>What tuning chose{where}</summary>", ""]
    lines += ["| method | learning rate | weight decay | weight | validation accuracy, % |", "|---|---|---|---|---|"]
    for name, choice in found.choices.items():
        tuning = found.experiment.tuning
        edge = " *" if tuning.edge(name, found.results) else ""
        weight = f"{choice.weight:g}" if METHODS[name].weights else ""
        rate, decay = ("", "") if METHODS[name].freeze else (f"{choice.lr:g}{edge}", f"{choice.weight_decay:g}")
        lines.append(f"| {label(name)} | {rate} | {decay} | {weight} | {tuning.mean(choice, found.results):.1f} |")
    return [*lines, "", f"Layers: {'; '.join(_layers(found))}", "", "</details>", ""]


def _layers(found: Found) -> list[str]:
    """The pairs of layers, each set of them once."""
    seen = {"; ".join(row["layers"]): None for row in found.results.rows.values() if "layers" in row}
    return [f"`{layers}`" for layers in seen]


def _missing(found: Mapping[str, Found], cells: Mapping[str, Experiment]) -> list[str]:
    """Cells, and parts of cells, that are planned and have no rows."""
    lines = []
    for name, cell in cells.items():
        if name not in found:
            lines.append(f"- {cell.title}: `{name}`{_instead(cell, found)}")
            continue
        if short := _missing_seeds(found[name]):
            parts = [f"{label(method)} {count}" for method, count in short.items()]
            lines.append(f"- {cell.title}: `{name}`, which counts for no goal yet; missing seeds of {', '.join(parts)}")
    return lines


def _missing_seeds(found: Found) -> dict[str, int]:
    """How many seeds of which methods of a cell did not run."""
    cell, values = found.experiment, accuracies(found)
    missing = {method: cell.seeds - len(values.get(method, {})) for method in cell.methods}
    return {method: count for method, count in missing.items() if count > 0}


def _instead(cell: Experiment, found: Mapping[str, Found]) -> str:
    """Which cell has the same networks, data and number of labels, and takes over what another cell has tuned."""

    def task(one: Experiment) -> tuple[object, ...]:
        return one.changes.get("pair", one.tuning.pair), one.targets, one.per_class, one.tuning.setting

    for name, one in found.items():
        tuning = one.experiment.tuning
        if isinstance(tuning, TakenOver) and task(one.experiment) == task(cell):
            return f"; it ran with the options of `{tuning.cell}`, in `{name}`"
    return ""
