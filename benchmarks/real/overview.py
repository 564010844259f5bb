"""One row for each cell: what a reader wants first. ``RESULTS.md`` shows the same rows (a test compares them)."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.evidence.experiments import Experiment
from benchmarks.evidence.report import Found, p_value, signed
from benchmarks.evidence.statistics import Comparison
from benchmarks.real.cells import label
from benchmarks.real.comparisons import (
    FROZEN,
    RECIPE,
    accuracies,
    best_student,
    is_ahead,
    is_level,
    mean_of,
    to_best_other,
)
from benchmarks.real.methods import CONTROLS, DEFAULT, ORTHOGONAL, PLAIN

#: Columns with mean accuracies, by method.
_COLUMNS = {
    PLAIN: "plain",
    "kd": "logits",
    "fitnets": "FitNets",
    "cka": "CKA",
    DEFAULT: "default",
    ORTHOGONAL: "rotation",
    RECIPE: "recipe",
    CONTROLS[RECIPE]: "control",
    FROZEN: "frozen teacher",
}
_DIFFERENCES = (
    "default over a random assignment",
    "recipe over its control",
    "recipe over plain",
    "recipe to the best other student",
)
_DATA = {
    "emoji": "emoji",
    "other emoji": "22 other classes of emoji",
    "fashion": "Fashion-MNIST",
    "digits": "digits of MNIST",
    "sections": "texts",
    "24 sections": "texts of 24 classes",
}
Tests = Mapping[str, Mapping[tuple[str, str], Comparison]]


def overview(found: Mapping[str, Found], tests: Tests) -> list[str]:
    """The table, of cells that are complete.

    Args:
        found: The cells, by name.
        tests: Comparisons of each of them.
    """
    titles = ["networks", "data, labels a class", *_COLUMNS.values(), *_DIFFERENCES]
    return [
        f"| {' | '.join(titles)} |",
        "|" + "---|" * len(titles),
        *(row(one, tests[name]) for name, one in sorted(found.items(), key=lambda item: _order(item[1].experiment))),
    ]


def row(found: Found, tests: Mapping[tuple[str, str], Comparison]) -> str:
    """Means of a cell, the best student in bold, and differences with their intervals."""
    values = accuracies(found)
    best = best_student(values)
    means = [f"{mean_of(values, name):.1f}" if name in values else "" for name in _COLUMNS]
    means = [f"**{mean}**" if name == best else mean for name, mean in zip(_COLUMNS, means, strict=True)]
    other, gain = to_best_other(values)
    pairs = ((DEFAULT, CONTROLS[DEFAULT]), (RECIPE, CONTROLS[RECIPE]), (RECIPE, PLAIN))
    gains = [*(_gain(tests.get(pair)) for pair in pairs), f"{signed(gain)}, {_COLUMNS.get(other) or label(other)}"]
    return f"| {' | '.join([*_task(found.experiment), *means, *gains])} |"


def _gain(one: Comparison | None) -> str:
    """A difference with its p value where that is small; empty where one of the two did not run."""
    if one is None:
        return ""
    return signed(one.gain) + (f" (p {p_value(one.corrected)})" if one.corrected < 0.05 else "")


def _task(cell: Experiment) -> tuple[str, str]:
    """The two networks, and the data with the number of labels for each class."""
    pair = _pair(cell).replace("EfficientNet-", "").replace("->", "→")
    return pair, f"{_DATA[cell.targets[0]]}, {cell.per_class[0]}"


def _pair(cell: Experiment) -> str:
    return str(cell.changes.get("pair", cell.tuning.pair))


def _order(cell: Experiment) -> tuple[str, int, int]:
    """Rows of the same two networks, then of the same data, stand together."""
    return _pair(cell), list(_DATA).index(cell.targets[0]), cell.per_class[0]


def counts(found: Mapping[str, Found], tests: Tests) -> str:
    """In how many cells the recipe is the best student or level with it, and certainly ahead of what."""
    level = sum(is_level(to_best_other(accuracies(one))[1]) for one in found.values())
    over_plain, over_control = (
        sum(is_ahead(tests[name][RECIPE, other]) for name in found) for other in (PLAIN, CONTROLS[RECIPE])
    )
    return (
        f"The recipe is the best student, or level with it, in {level} of {len(found)}; it is certainly ahead of plain "
        f"training in {over_plain}, and of its control in {over_control}."
    )
