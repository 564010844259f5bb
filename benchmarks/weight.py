"""Which ratio of gradients should ``suggest_weight`` aim at?

Small students from scratch learn from few labels at six weights of the term, for two recipes and three pairs of
networks; all accuracies are on validation images: ``python -m benchmarks.weight``. Before each student trains,
``suggest_weight`` measures the weight at which the gradient of the term is as large as that of the task, so that every
weight is a ratio of gradients too. The default ratio is the one that loses least accuracy to the best weight of each
pair and recipe.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.efficiency import BLOCKS, PENULTIMATE, accuracy, build, train
from benchmarks.pages import write_page
from examples.digits import digits
from examples.glyphs import glyphs
from examples.networks import STUDENT_WIDTHS, TEACHER_WIDTHS
from lightning_otrt import RepresentationTransfer, suggest_weight

RESULTS = Path(__file__).parent / "results" / "weight.json"
RECIPES: dict[str, dict[str, Any]] = {"blocks, correlation": {"layers": BLOCKS}, "penultimate, euclidean": PENULTIMATE}
WEIGHTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
FRACTIONS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BATCH_SIZE = 64

#: By recipe: for each seed the weight of equal gradients, and the accuracies by weight; 0 is plain training.
Found = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Problem:
    """A teacher's data and widths, the student's, few labelled images of a seed and images that validate.

    Attributes:
        source: Makes what the teacher learns.
        widths: Widths of teacher and student.
        few: Makes the labelled images of a seed.
        validation: Makes the images that accuracies are measured on.
    """

    source: Callable[[], TensorDataset]
    widths: tuple[tuple[int, ...], tuple[int, ...]]
    few: Callable[[int], TensorDataset]
    validation: Callable[[], TensorDataset]


def _lowercase(seed: int) -> TensorDataset:
    return glyphs("lowercase", "train", per_class=10, seed=seed)


PROBLEMS = {
    "A–Z, 0–9 → a–z, half the width": Problem(
        partial(glyphs, "source", "train"),
        (TEACHER_WIDTHS, STUDENT_WIDTHS),
        _lowercase,
        partial(glyphs, "lowercase", "validation"),
    ),
    "A–Z, 0–9 → a–z, a quarter": Problem(
        partial(glyphs, "source", "train"),
        (TEACHER_WIDTHS, (4, 8, 16)),
        _lowercase,
        partial(glyphs, "lowercase", "validation"),
    ),
    # Nearly all of these images are new to a student, and none is one of those that the examples test on.
    "digits, half the width": Problem(
        partial(digits, "train"),
        (TEACHER_WIDTHS, STUDENT_WIDTHS),
        lambda seed: digits("train", per_class=5, seed=seed),
        partial(digits, "train"),
    ),
}


def run(problem: Problem, *, seeds: int, steps: int, teacher_steps: int) -> Found:
    """Accuracies of students at all weights."""
    source, validation = problem.source(), problem.validation()
    teacher_widths, student_widths = problem.widths
    teacher = train(
        build(teacher_widths, source, 0),
        source,
        steps=teacher_steps,
        batch_size=BATCH_SIZE,
        seed=0,
        lr=1e-2,
        weight_decay=1e-2,
    )
    found: Found = {name: [] for name in RECIPES}
    for seed in range(1, seeds + 1):
        few = problem.few(seed)
        settings = {"steps": steps, "batch_size": min(BATCH_SIZE, len(few)), "seed": seed}
        plain = accuracy(train(build(student_widths, few, seed), few, **settings), validation)
        for name, options in RECIPES.items():
            student = build(student_widths, few, seed).train()
            batches = DataLoader(few, settings["batch_size"], shuffle=True, generator=torch.Generator().manual_seed(0))
            suggestion = suggest_weight(
                student, RepresentationTransfer(teacher, **options), batches, loss_fn=F.cross_entropy, ratio=1.0
            )
            by_weight = {0.0: plain}
            for weight in WEIGHTS:
                transfer = RepresentationTransfer(teacher, **options, weight=weight)
                student = train(build(student_widths, few, seed), few, transfer=transfer, **settings)
                by_weight[weight] = accuracy(student, validation)
            found[name].append({"equal": suggestion.weight, "accuracy": by_weight})
            shown = ", ".join(f"{weight:g}: {value:.1f}" for weight, value in by_weight.items())
            print(f"  seed {seed}, {name}: equal at {suggestion.weight:.2f}; {shown}", flush=True)
    return found


def lost(runs: list[dict[str, Any]], fraction: float) -> float:
    """Points of accuracy between the best weight and that of ``fraction``, by the mean over seeds.

    Accuracies are interpolated over the logarithm of the weight; outside of the weights tried they are those of the
    nearest one.
    """
    curve = mean_by_weight(runs)
    weights = [math.log(weight) for weight in WEIGHTS]
    values = [curve[weight] for weight in WEIGHTS]
    reached = [float(np.interp(math.log(fraction * each["equal"]), weights, values)) for each in runs]
    return max(values) - statistics.mean(reached)


def mean_by_weight(runs: list[dict[str, Any]]) -> dict[float, float]:
    """Accuracy by weight, the mean over seeds."""
    return {weight: statistics.mean(each["accuracy"][weight] for each in runs) for weight in (0.0, *WEIGHTS)}


def table(found: Mapping[str, Found]) -> str:
    """The results as Markdown."""
    runs = {(problem, recipe): runs for problem, recipes in found.items() for recipe, runs in recipes.items()}
    heads = " | ".join(f"{weight:g}" for weight in WEIGHTS)
    lines = [f"| pair | recipe | equal at | plain | {heads} |", "|---" * (len(WEIGHTS) + 4) + "|"]
    for (problem, recipe), each in runs.items():
        equal = statistics.mean(one["equal"] for one in each)
        curve = mean_by_weight(each)
        values = [f"{value:.1f}" if value < max(curve.values()) else f"**{value:.1f}**" for value in curve.values()]
        lines.append(f"| {problem} | {recipe} | {equal:.2g} | {' | '.join(values)} |")
    heads = " | ".join(f"{fraction:g}" for fraction in FRACTIONS)
    lines += ["", f"| points lost to the best weight | {heads} |", "|---" * (len(FRACTIONS) + 1) + "|"]
    for (problem, recipe), each in runs.items():
        values = [f"{lost(each, fraction):.1f}" for fraction in FRACTIONS]
        lines.append(f"| {problem}: {recipe} | {' | '.join(values)} |")
    for name, over in (("mean", statistics.mean), ("worst", max)):
        values = [f"{over([lost(each, fraction) for each in runs.values()]):.1f}" for fraction in FRACTIONS]
        lines.append(f"| **{name}** | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of students of each kind")
    parser.add_argument("--steps", type=int, default=200, help="steps of a student")
    parser.add_argument("--teacher-steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, problem in PROBLEMS.items():
        print(name, flush=True)
        found[name] = run(problem, **vars(options))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"settings": vars(options), "found": found}, indent=1) + "\n")
    write_page(f"# Weight\n\n`python -m benchmarks.weight`, {options.seeds} seeds.\n\n{table(found)}")
    print(table(found))


if __name__ == "__main__":
    main()
