"""Claims that were written down before the runs, with what was measured and whether they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.evidence.experiments import FRESH
from benchmarks.evidence.methods import DEFAULT, METHODS
from benchmarks.evidence.report import NAMES, Accuracies, Found, against_all, label, p_value, signed
from benchmarks.evidence.statistics import estimate


@dataclass(frozen=True)
class Goal:
    """A claim and what was measured.

    Attributes:
        claim: What should hold.
        measured: What does.
        holds: Whether it does.
    """

    claim: str
    measured: str
    holds: bool


def goals(found: Mapping[str, Found]) -> list[Goal]:
    """The claims that the main experiments were made for, as far as they were run."""
    reached: list[Goal] = []
    if "main" in found:
        for target, points in zip(FRESH, (10, 5), strict=True):
            accuracies = found["main"].accuracies(target, 10)
            reached += [*_main_goals(accuracies, NAMES[target], points), *_recommended_goal(accuracies, NAMES[target])]
    for name in ("compression", "digits"):
        if name in found:
            experiment = found[name].experiment
            accuracies = found[name].accuracies(experiment.targets[0], experiment.per_class[0])
            where = f"{NAMES[experiment.targets[0]]}, compression"
            reached += [*_best_rival_goal(accuracies, where, 0.0), *_control_goals(accuracies, where)]
            reached += _recommended_goal(accuracies, where) if name == "compression" else []
    for name in ("curve", "curve-compression"):
        if name in found:
            for target in found[name].experiment.targets:
                reached += _best_rival_goal(found[name].accuracies(target, 50), f"{NAMES[target]}, 50 per class", 3.0)
    if "copied" in found:
        for target in found["copied"].experiment.targets:
            accuracies = found["copied"].accuracies(target, 10)
            reached += _not_worse_goal(accuracies, NAMES[target])
            reached += _near_best_goals(accuracies, f"{NAMES[target]}, setting 1")
    if "other" in found:
        for target in found["other"].experiment.targets:
            accuracies = found["other"].accuracies(target, 10)
            reached += _recipe_goals(accuracies, NAMES[target])
            reached += _near_best_goals(accuracies, f"{NAMES[target]}, setting 1x")
    for name, where in (("wide", "a wider pair"), ("residual", "a residual pair"), ("transformer", "transformers")):
        if name in found:
            experiment = found[name].experiment
            for target in experiment.targets:
                accuracies = found[name].accuracies(target, experiment.per_class[0])
                reached += _ordering_goals(accuracies, f"{NAMES[target]}, {where}")
                reached += _level_goal(accuracies, f"{NAMES[target]}, {where}") if name == "transformer" else []
    return reached


def rivals(accuracies: Accuracies) -> Accuracies:
    """Published methods other than this library's plans: neither plain training nor a control."""
    return {
        name: values
        for name, values in accuracies.items()
        if name in METHODS and not METHODS[name].ours and not METHODS[name].control and name != "plain"
    }


def best_rival(accuracies: Accuracies) -> str | None:
    """The rival with the highest mean."""
    others = rivals(accuracies)
    return max(others, key=lambda name: estimate(list(others[name].values())).mean, default=None)


#: Methods that claims are made of, with their names in claims.
SUBJECTS = {
    DEFAULT: "the default",
    "ot-blocks+kd": "the default with KD",
    "ot-blocks+lwf": "the default with KD",
    f"{DEFAULT}+distillation": "the default with `distillation`",
    "rotation": "orthogonal",
    "rotation+distillation": "orthogonal with `distillation`",
}


#: The recommended one.
RECIPE = "rotation+distillation"
#: What stands beside them with a plan that is drawn at random, and all else the same.
CONTROLS = {
    DEFAULT: "random",
    f"{DEFAULT}+distillation": "random+distillation",
    "rotation": "rotation-random",
    "rotation+distillation": "rotation-random+distillation",
}


def _best_rival_goal(accuracies: Accuracies, where: str, points: float) -> list[Goal]:
    """Each recipe against the best rival."""
    rival = best_rival(accuracies)
    if rival is None:
        return []
    found = []
    for method, subject in SUBJECTS.items():
        comparisons = against_all(method, accuracies)
        if rival in comparisons:
            gain = comparisons[rival].gain
            claim = f"{where}: {subject} is ahead of the best rival by ≥ {points:g} points"
            measured = f"{signed(gain)} against {label(rival)}, p {p_value(comparisons[rival].corrected)}"
            found.append(Goal(claim, measured, gain.mean >= points))
    return found


def _recommended_goal(accuracies: Accuracies, where: str) -> list[Goal]:
    """The recommended recipe ahead of all rivals at once, by three points."""
    comparisons = {name: one for name, one in against_all(RECIPE, accuracies).items() if name in rivals(accuracies)}
    if not comparisons:
        return []
    missed = [name for name, one in comparisons.items() if one.gain.mean < 3 or one.corrected >= 0.01]
    nearest = min(comparisons, key=lambda name: comparisons[name].gain.mean)
    measured = (
        f"{len(comparisons) - len(missed)} of {len(comparisons)}; {signed(comparisons[nearest].gain)} against "
        f"{label(nearest)}, p {p_value(comparisons[nearest].corrected)}"
    )
    claim = f"{where}: {SUBJECTS[RECIPE]} is ahead of every rival by ≥ 3 points, corrected p < 0.01"
    return [Goal(claim, measured, not missed)]


def _near_best_goals(accuracies: Accuracies, where: str) -> list[Goal]:
    """No recipe more than a point behind the best rival."""
    rival, found = best_rival(accuracies), []
    for method in (DEFAULT, "rotation", RECIPE):
        comparisons = against_all(method, accuracies)
        if rival is not None and rival in comparisons:
            one = comparisons[rival]
            claim = f"{where}: {SUBJECTS[method]} is not more than 1 point behind the best rival"
            measured = f"{signed(one.gain)} against {label(rival)}, p {p_value(one.corrected)}"
            found.append(Goal(claim, measured, one.gain.mean >= -1))
    return found


def _level_goal(accuracies: Accuracies, where: str) -> list[Goal]:
    """The recommended recipe level with FitNets, or ahead of them."""
    comparisons = against_all(RECIPE, accuracies)
    hints = [name for name in comparisons if name.startswith("fitnets")]
    return [
        Goal(
            f"{where}: {SUBJECTS[RECIPE]} is level with {label(name)} or ahead (not behind with corrected p < 0.05)",
            f"{signed(comparisons[name].gain)}, p {p_value(comparisons[name].corrected)}",
            comparisons[name].gain.mean >= 0 or comparisons[name].corrected >= 0.05,
        )
        for name in hints
    ]


def _main_goals(accuracies: Accuracies, where: str, points: float) -> list[Goal]:
    if DEFAULT not in accuracies:
        return []
    comparisons = against_all(DEFAULT, accuracies)
    published = [name for name in comparisons if name == "plain" or name in rivals(accuracies)]
    beaten = [name for name in published if comparisons[name].gain.mean > 0 and comparisons[name].corrected < 0.01]
    unbeaten = ", ".join(label(name) for name in published if name not in beaten)
    found = [
        Goal(
            f"{where}: the default beats plain and every rival, corrected p < 0.01",
            f"{len(beaten)} of {len(published)}" + (f"; not {unbeaten}" if unbeaten else ""),
            len(beaten) == len(published),
        ),
        *_best_rival_goal(accuracies, where, points),
    ]
    return [
        *found,
        *_beats_goals(accuracies, DEFAULT, ("ot-penultimate",), f"{where}: the default", 0.05),
        *_control_goals(accuracies, where),
    ]


def _control_goals(accuracies: Accuracies, where: str) -> list[Goal]:
    """Each recipe against its random control with the same companions."""
    return [
        goal
        for method, control in CONTROLS.items()
        for goal in _beats_goals(accuracies, method, (control,), f"{where}: {SUBJECTS[method]}", 0.05)
    ]


def _not_worse_goal(accuracies: Accuracies, where: str) -> list[Goal]:
    if DEFAULT not in accuracies:
        return []
    comparisons = {name: one for name, one in against_all(DEFAULT, accuracies).items() if name in rivals(accuracies)}
    worse = [label(name) for name, one in comparisons.items() if one.gain.mean < 0 and one.corrected < 0.05]
    claim = f"{where}, setting 1: the default is not worse than any rival (corrected p < 0.05)"
    return [Goal(claim, f"worse than {', '.join(worse)}" if worse else "not worse than any", not worse)]


def goals_table(reached: list[Goal]) -> list[str]:
    """Claims, figures and verdicts."""
    lines = ["| claim | measured | |", "|---|---|---|"]
    lines += [f"| {goal.claim} | {goal.measured} | {'holds' if goal.holds else '**fails**'} |" for goal in reached]
    return [*lines, ""]


def _recipe_goals(accuracies: Accuracies, where: str) -> list[Goal]:
    """In setting 1x the paper's recipe is the recommended one."""
    return _beats_goals(
        accuracies, "ot-penultimate", ("plain", "identity"), f"{where}, setting 1x: the paper's recipe", 0.05
    )


def _ordering_goals(accuracies: Accuracies, where: str) -> list[Goal]:
    """The default ahead of plain training, of the best rival and of a random assignment."""
    return [
        *_beats_goals(accuracies, DEFAULT, ("plain",), f"{where}: the default", 0.05),
        *_control_goals(accuracies, where),
        *_best_rival_goal(accuracies, where, 0.0),
    ]


def _beats_goals(
    accuracies: Accuracies, method: str, others: tuple[str, ...], subject: str, level: float
) -> list[Goal]:
    comparisons = against_all(method, accuracies)
    return [
        Goal(
            f"{subject} beats {label(name)}, corrected p < {level:g}",
            f"{signed(one.gain)}, p {p_value(one.corrected)}",
            one.gain.mean > 0 and one.corrected < level,
        )
        for name, one in comparisons.items()
        if name in others
    ]
