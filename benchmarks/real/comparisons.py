"""Which methods of a cell are compared with which, and what the recipe should reach there."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from benchmarks.evidence.goals import Goal
from benchmarks.evidence.report import Accuracies, Found, p_value, signed
from benchmarks.evidence.statistics import Comparison, Estimate, family
from benchmarks.real.cells import label
from benchmarks.real.methods import CONTROLS, PLAIN

#: The recipe that the documentation recommends for real checkpoints: of ours the best on validation samples.
RECIPE = "orthogonal+kd"
#: The ceiling, which is no student.
FROZEN = "frozen"
#: Labels per class that are few.
_FEW = 20


def accuracies(found: Found) -> Accuracies:
    """Accuracies of a cell by method and seed."""
    return found.accuracies(found.experiment.targets[0], found.experiment.per_class[0])


def comparisons_of(values: Accuracies) -> dict[tuple[str, str], Comparison]:
    """Each method against plain training, and ours against their controls: one family."""
    pairs = [(method, PLAIN) for method in values if method != PLAIN] + list(CONTROLS.items())
    return family({(one, other): (values[one], values[other]) for one, other in pairs if {one, other} <= values.keys()})


def mean_of(values: Accuracies, method: str) -> float:
    """The mean accuracy of a method over its seeds."""
    return statistics.fmean(values[method].values())


def best_student(values: Accuracies, *, without: str = "") -> str:
    """The student with the best mean; empty where there is none."""
    return max(
        (name for name in values if name not in (FROZEN, without)), key=lambda name: mean_of(values, name), default=""
    )


def to_best_other(values: Accuracies) -> tuple[str, Estimate]:
    """The best other student, and how far the recipe is ahead of it."""
    best = best_student(values, without=RECIPE)
    return best, family({best: (values[RECIPE], values[best])})[best].gain


def is_level(gain: Estimate) -> bool:
    """Whether a difference is no loss that is certain: its 95 % interval reaches 0, or it is a gain."""
    return gain.mean >= 0 or gain.mean + gain.half_width >= 0


def is_ahead(one: Comparison) -> bool:
    """Whether a gain is certain."""
    return one.gain.mean > 0 and one.corrected < 0.05


def goals(found: Found, tests: Mapping[tuple[str, str], Comparison]) -> list[Goal]:
    """What the recipe should reach in a cell, and what it does."""
    values, where = accuracies(found), found.experiment.title
    if RECIPE not in values or not best_student(values, without=RECIPE):
        return []
    best, gain = to_best_other(values)
    measured = f"{signed(gain)} to {label(best)}"
    reached = [Goal(f"{where}: the best student or within its interval", measured, is_level(gain))]
    if one := tests.get((RECIPE, CONTROLS[RECIPE])):
        measured = f"{signed(one.gain)}, p {p_value(one.corrected)}"
        reached.append(Goal(f"{where}: beats its control, corrected p < 0.05", measured, is_ahead(one)))
    few = found.experiment.per_class[0] <= _FEW and found.experiment.tuning.setting == "scratch"
    if few and (one := tests.get((RECIPE, PLAIN))):
        claim = f"{where}: gains ≥ 5 points over plain training"
        reached.append(Goal(claim, signed(one.gain), one.gain.mean >= 5))
    return reached
