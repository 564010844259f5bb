"""Which two of six layers to compare: ``python -m benchmarks.real.depths``, half an hour of one core.

A student of two layers is compared with a teacher of six. ``layers="auto"`` takes the third and the last of these, at
the same relative depths. Here students of a cell of ``python -m benchmarks.real`` follow other layers, on validation
samples, with the options that tuning chose for the method. Rows are appended to a file; the command continues where it
was stopped.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.evidence.report import gather, p_value, signed
from benchmarks.evidence.runs import Results, Run, complete
from benchmarks.evidence.statistics import estimate, family
from benchmarks.pages import write_page
from benchmarks.real.__main__ import RESULTS
from benchmarks.real.cells import CELLS, label
from benchmarks.real.methods import CONTROLS
from benchmarks.real.training import TEACHER_LAYERS, execute

SEEDS = (2000, 2001, 2002, 2003)
CELL = "sections-20-bert2"
#: The recipe, its control, and the rival that leads on texts.
METHODS = ("orthogonal+kd", CONTROLS["orthogonal+kd"], "cka")
#: Layers of the teacher, from 1 to 6, for each layer of the student; None: the student's layer is left out.
AUTOMATIC = (3, 6)
CHOICES = (AUTOMATIC, (1, 2), (2, 4), (1, 6), (5, 6), (6, 6), (None, 6))


def runs(method: str, choice: tuple[int | None, ...]) -> list[Run]:
    """The runs of a method with these layers of the teacher."""
    one = gather(Results(RESULTS / f"{CELL}.jsonl"), {CELL: CELLS[CELL]})[CELL]
    target, per_class = one.experiment.targets[0], one.experiment.per_class[0]
    base = replace(one.experiment.run(method, one.choices[method], target, per_class, 0), split="validation")
    names = tuple("" if layer is None else f"bert.encoder.layer.{layer - 1}" for layer in choice)
    return [replace(base, seed=seed, options=((TEACHER_LAYERS, names),)) for seed in SEEDS]


def main() -> None:
    """Run what is missing, and write the page."""
    results = Results(RESULTS / "depths.jsonl")
    planned = {(method, choice): runs(method, choice) for choice in CHOICES for method in METHODS}
    # Seed by seed, and all methods of a choice in turn: they share what the teacher computes.
    complete([of_seed[i] for i in range(len(SEEDS)) for of_seed in planned.values()], results, execute, title="depths")
    values = {
        one: {run.seed: float(results.rows[run.key]["accuracy"]) for run in of_seed} for one, of_seed in planned.items()
    }
    pairs = [(one, (one[0], AUTOMATIC)) for one in planned if one[1] != AUTOMATIC]
    tests = family({(one, other): (values[one], values[other]) for one, other in pairs})
    lines = [
        "# Depths on real checkpoints",
        "",
        "`python -m benchmarks.real.depths`: validation accuracy in % of BERT 2 × 128 with MiniLM's six layers as "
        f"teacher, 20 texts of each of 12 sections, {len(SEEDS)} paired seeds with 95 % intervals. The first column "
        "names the teacher's layer for each layer of the student. Options are those that tuning chose for 3 and 6, the "
        'layers that `layers="auto"` takes. Differences are to these; p values are corrected over the table.',
        "",
        f"| layers | {' | '.join(f'{label(method)} | to 3 and 6 (p)' for method in METHODS)} |",
        f"|---|{'---|---|' * len(METHODS)}",
    ]
    for choice in CHOICES:
        cells = ["; ".join("none" if layer is None else str(layer) for layer in choice)]
        for method in METHODS:
            cells.append(str(estimate(list(values[method, choice].values()))))
            test = tests.get(((method, choice), (method, AUTOMATIC)))
            cells.append("" if test is None else f"{signed(test.gain)} ({p_value(test.corrected)})")
        lines.append(f"| {' | '.join(cells)} |")
    print(write_page("\n".join(lines), RESULTS.parent))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
