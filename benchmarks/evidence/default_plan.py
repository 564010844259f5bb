"""Does a rotation do so much better than transport that it should be the default? On targets that decided nothing."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.evidence.methods import DEFAULT
from benchmarks.evidence.report import NAMES, Accuracies, Found, p_value, signed
from benchmarks.evidence.statistics import estimate, family

#: Experiments with fresh targets, and how the table calls them.
SETTINGS = {
    "main": "smaller student, new task",
    "compression": "compression",
    "digits": "compression",
    "copied": "copied student",
    "other": "student of another network",
    "pool": "unlabelled pool",
    "wide": "wider pair",
    "residual": "residual pair",
    "transformer": "transformers",
}
#: Rotation and transport, each as often alone as with `distillation`.
PAIRS = {"alone": ("rotation", DEFAULT), "with distillation": ("rotation+distillation", f"{DEFAULT}+distillation")}
#: In how many settings the rotation has to be ahead for certain, and in none behind.
ENOUGH, LEVEL = 3, 0.05


def default_plan(found: Mapping[str, Found]) -> list[str]:
    """A table of paired differences, corrected over the table, and what follows from it."""
    places: dict[str, Accuracies] = {}
    for name, title in SETTINGS.items():
        if name in found:
            experiment = found[name].experiment
            for target in experiment.targets:
                places[f"{NAMES[target]}, {title}"] = found[name].accuracies(target, experiment.per_class[0])
    tests = family(
        {
            (place, companion): (values[rotation], values[transport])
            for place, values in places.items()
            for companion, (rotation, transport) in PAIRS.items()
            if {rotation, transport} <= values.keys()
        }
    )
    if not tests:
        return []
    lines = ["| setting | rotation and transport | rotation is ahead by, points | p (Holm) |", "|---|---|---|---|"]
    for (place, companion), one in tests.items():
        means = " and ".join(str(estimate(list(places[place][name].values()))) for name in PAIRS[companion])
        lines.append(f"| {place}, {companion} | {means} | {signed(one.gain)} | {p_value(one.corrected)} |")
    certain = {key: one for key, one in tests.items() if one.corrected < LEVEL}
    ahead = {place for (place, _), one in certain.items() if one.gain.mean > 0}
    behind = {place for (place, _), one in certain.items() if one.gain.mean < 0}
    changes = len(ahead) >= ENOUGH and not behind
    verdict = (
        f"The rule, written down before: a rotation becomes the default if it is ahead with corrected p < {LEVEL:g} in "
        f"at least {ENOUGH} settings, and behind in none. It is ahead in {len(ahead)} and behind in {len(behind)}, so "
        f"the default {'changes' if changes else 'stays transport'}."
    )
    return [verdict, "", *lines, ""]
