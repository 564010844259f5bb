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
ALONE = "alone"
PAIRS = {ALONE: ("rotation", DEFAULT), "with distillation": ("rotation+distillation", f"{DEFAULT}+distillation")}
#: In how many settings the rotation has to be ahead for certain, and in none behind.
ENOUGH, LEVEL = 3, 0.05


def default_plan(found: Mapping[str, Found]) -> list[str]:
    """A table of paired differences, corrected over the table, and what follows from it."""
    settings: dict[str, Accuracies] = {}
    for name, title in SETTINGS.items():
        if name in found:
            experiment = found[name].experiment
            for target in experiment.targets:
                settings[f"{NAMES[target]}, {title}"] = found[name].accuracies(target, experiment.per_class[0])
    tests = family(
        {
            (place, companion): (values[rotation], values[transport])
            for place, values in settings.items()
            for companion, (rotation, transport) in PAIRS.items()
            if {rotation, transport} <= values.keys()
        }
    )
    if not tests:
        return []
    lines = ["| setting | rotation and transport | rotation is ahead by, points | p (Holm) |", "|---|---|---|---|"]
    for (place, companion), one in tests.items():
        means = " and ".join(str(estimate(list(settings[place][name].values()))) for name in PAIRS[companion])
        lines.append(f"| {place}, {companion} | {means} | {signed(one.gain)} | {p_value(one.corrected)} |")
    certain = {key: one for key, one in tests.items() if one.corrected < LEVEL}
    ahead, behind = ({place for place, one in certain.items() if sign * one.gain.mean > 0} for sign in (1, -1))
    alone = [sum(companion == ALONE for _, companion in places) for places in (ahead, behind)]
    changes = alone[0] >= ENOUGH and not alone[1]
    verdict = (
        f"A rotation becomes the default if it is ahead with corrected p < {LEVEL:g} in at least {ENOUGH} settings, "
        "and behind in none. The default has no distillation, so the rows *alone* decide. There it is ahead in "
        f"{alone[0]} and behind in {alone[1]}, so the default {'changes' if changes else 'stays transport'}. With "
        f"distillation it is ahead in {len(ahead) - alone[0]} and behind in {len(behind) - alone[1]}."
    )
    return [verdict, "", *lines, ""]
