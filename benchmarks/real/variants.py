"""Other layers, couplings and `plan="auto"`: ``python -m benchmarks.real.variants``, two hours of one core.

A student of two layers follows a teacher of six. ``layers="auto"`` takes the third and the last of these, at the same
relative depths; here students follow other ones. And where some pairs of layers are linear streams and others are not,
``plan="auto"`` takes a rotation for the first and a transport plan for the others. On texts CKA leads, whose gradient
follows the cross-correlation with its singular values; a rotation has them all set to 1. So the coupling alone is
changed, too.

Students of cells of ``python -m benchmarks.real`` are trained on validation samples, with the options that tuning chose
for the method as it is; couplings that are in no cell are tuned as those are. Rows are appended to a file; the command
continues where it was stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.evidence.report import gather, p_value, signed
from benchmarks.evidence.runs import Results, Run, complete
from benchmarks.evidence.statistics import estimate, family
from benchmarks.evidence.tuning import tune
from benchmarks.pages import write_page
from benchmarks.real.__main__ import RESULTS
from benchmarks.real.cells import CELLS, label
from benchmarks.real.comparisons import RECIPE
from benchmarks.real.data import check_texts
from benchmarks.real.methods import CONTROLS, DEFAULT, ORTHOGONAL
from benchmarks.real.training import TEACHER_LAYERS, execute

SEEDS = (2000, 2001, 2002, 2003)


@dataclass(frozen=True)
class Variant:
    """One row of a table: methods in a cell with some options changed.

    Attributes:
        name: What is shown.
        cell: Name of the cell.
        methods: One for each column.
        options: What is changed.
    """

    name: str
    cell: str
    methods: tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def runs(self) -> dict[str, list[Run]]:
        """The runs of each column, one for each seed, on validation samples."""
        one = gather(Results(RESULTS / f"{self.cell}.jsonl"), {self.cell: CELLS[self.cell]})[self.cell]
        target, per_class = one.experiment.targets[0], one.experiment.per_class[0]
        found = {}
        for method in self.methods:
            run = one.experiment.run(method, one.choices[method], target, per_class, 0)
            run = replace(run, split="validation", options=self.options)
            found[method] = [replace(run, seed=seed) for seed in SEEDS]
        return found


def _layers(*choice: int | None) -> Variant:
    """A row of teacher layers, from 1 to 6, for each layer of the student; None leaves the student's layer out."""
    names = tuple("" if layer is None else f"bert.encoder.layer.{layer - 1}" for layer in choice)
    shown = "; ".join("none" if layer is None else str(layer) for layer in choice)
    # The recipe, its control, and the rival that leads on texts.
    methods = (RECIPE, CONTROLS[RECIPE], "cka")
    return Variant(shown, "sections-20-bert2", methods, ((TEACHER_LAYERS, names),))


#: The first row is what the others are compared with.
LAYERS = (_layers(3, 6), _layers(1, 2), _layers(2, 4), _layers(1, 6), _layers(5, 6), _layers(6, 6), _layers(None, 6))
#: Cells whose last pair of layers is rectified on both sides, and whose others are linear bottlenecks of the teacher.
MIXED = ("emoji-5-resnet10", "fashion-20-resnet10", "emoji-5-mobilenet")
#: For each cell the rotation everywhere, ``plan="auto"`` with the options of the rotation, and transport everywhere.
PLANS = {
    cell: (
        Variant("rotation", cell, (ORTHOGONAL, "orthogonal+kd")),
        Variant('`plan="auto"`', cell, (ORTHOGONAL, "orthogonal+kd"), (("plan", "auto"),)),
        Variant("transport", cell, (DEFAULT, "transport+kd")),
    )
    for cell in MIXED
}


#: Where CKA leads, the methods of that cell beside which the couplings stand, and the couplings.
TEXTS = "sections-20-bert2"
BESIDE = ("cka", ORTHOGONAL, DEFAULT)
COUPLINGS = ("correlated", "correlated-raw", "rotated", "linear")


def tuned(results: Results) -> dict[str, list[Run]]:
    """Tune the couplings, as the methods of the cell are tuned; the runs of each method, on validation samples."""

    def go(runs: Sequence[Run], title: str) -> None:
        check_texts(runs, results)
        complete(runs, results, execute, title=f"couplings, {title}")

    experiment = CELLS[TEXTS]
    target, per_class = experiment.targets[0], experiment.per_class[0]
    choices = {name: experiment.tuning.choice(name, Results(RESULTS / f"{TEXTS}.jsonl")) for name in BESIDE}
    choices |= tune(experiment.tuning, list(COUPLINGS), results, go)
    found = {name: experiment.run(name, choice, target, per_class, 0) for name, choice in choices.items()}
    return {name: [replace(run, split="validation", seed=seed) for seed in SEEDS] for name, run in found.items()}


def couplings(runs: Mapping[str, Sequence[Run]], results: Results) -> list[str]:
    """Accuracies of methods by their runs, and their differences to CKA and to the rotation."""
    values = {name: {run.seed: float(results[run]["accuracy"]) for run in each} for name, each in runs.items()}
    pairs = [(name, other) for other in BESIDE[:2] for name in values if name != other]
    tests = family({(name, other): (values[name], values[other]) for name, other in pairs})
    lines = [
        "| coupling | accuracy, % | learning rate | weight | to CKA | to the rotation |",
        "|---|---|---|---|---|---|",
    ]
    for name, each in runs.items():
        cells = [label(name), str(estimate(list(values[name].values()))), f"{each[0].lr:g}", f"{each[0].weight:g}"]
        for other in BESIDE[:2]:
            test = tests.get((name, other))
            cells.append("" if test is None else f"{signed(test.gain)} (p {p_value(test.corrected)})")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def table(rows: Iterable[Variant], results: Results, header: Iterable[str]) -> list[str]:
    """Accuracies of the rows, and their differences to the first one, corrected over the table."""
    rows = list(rows)
    values: Mapping[tuple[int, int], dict[int, float]] = {
        (number, column): {run.seed: float(results[run]["accuracy"]) for run in of_seed}
        for number, row in enumerate(rows)
        for column, of_seed in enumerate(row.runs().values())
    }
    tests = family({place: (found, values[0, place[1]]) for place, found in values.items() if place[0]})
    names = list(header)
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for number, row in enumerate(rows):
        cells = [row.name]
        for column in range(len(row.methods)):
            cells.append(str(estimate(list(values[number, column].values()))))
            test = tests.get((number, column))
            cells.append("" if test is None else f"{signed(test.gain)} (p {p_value(test.corrected)})")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    """Run what is missing, and write the page."""
    results = Results(RESULTS / "variants.jsonl")
    everything = [
        of_seed[number]
        for rows in (LAYERS, *PLANS.values())
        for number in range(len(SEEDS))
        for row in rows
        for of_seed in row.runs().values()
    ]
    check_texts(everything, results)
    complete(everything, results, execute, title="variants")
    coupled = tuned(results)
    complete(
        [each[number] for number in range(len(SEEDS)) for each in coupled.values()], results, execute, title="runs"
    )
    lines = [
        "# Layers and plans on real checkpoints",
        "",
        f"`python -m benchmarks.real.variants`: validation accuracy in %, {len(SEEDS)} paired seeds with 95 % "
        "intervals. Options are those that tuning chose for the method as it is. Differences are to the first row of a "
        "table; their p values are corrected over the table, the intervals are not. With few seeds and many tests "
        "hardly any difference could be certain.",
        "",
        "## Which layers of a teacher of six a student of two follows",
        "",
        "MiniLM → BERT 2 × 128, 20 texts of each of 12 sections. The first column names the teacher's layer for each "
        'layer of the student; `layers="auto"` takes 3 and 6, and options were tuned for these.',
        "",
        *table(LAYERS, results, ["layers", *(cell for name in LAYERS[0].methods for cell in (label(name), "to 3; 6"))]),
        "## What CKA owes its lead on texts to",
        "",
        "The same pair and texts. CKA pulls the student towards C x, with C the cross-correlation of the batch; *CKA "
        "as a coupling* does so with the C of the running moments, and a rotation is that C with all singular values "
        "set to 1. *Raw* neurons keep their scale. Each coupling is tuned as the methods of the cell are.",
        "",
        *couplings(coupled, results),
        "## A plan for each pair of layers",
        "",
        "EfficientNet-Lite0's blocks end in linear bottlenecks, and its last layer in ReLU6. For the first four pairs "
        '`plan="auto"` takes the rotation, for the last one transport. The values tell, since what the '
        'teacher computed is replayed. `plan="auto"` has the options that were tuned for the rotation.',
        "",
    ]
    columns = ("alone", "with distillation")
    for cell, rows in PLANS.items():
        header = [CELLS[cell].title, *(name for column in columns for name in (column, "to the rotation"))]
        lines += table(rows, results, header)
    print(write_page("\n".join(lines), RESULTS.parent))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
