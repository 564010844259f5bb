"""Tables of what the runs found, as the page ``results/transfer.md``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.evidence.experiments import EXPERIMENTS, FRESH, Experiment
from benchmarks.evidence.methods import DEFAULT, METHODS
from benchmarks.evidence.runs import Results, Run
from benchmarks.evidence.statistics import Estimate, compare, estimate

NAMES = {
    "greek": "Greek",
    "cyrillic": "Cyrillic",
    "source": "A–Z and 0–9",
    "lowercase": "a–z",
    "digits": "handwritten digits",
    "armenian": "Armenian",
    "georgian": "Georgian",
}
Accuracies = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Found:
    """An experiment with the rows that are there.

    Attributes:
        name: Its name.
        experiment: What was planned.
        choices: The hyperparameters of each method whose tuning is complete.
        results: All rows.
    """

    name: str
    experiment: Experiment
    choices: Mapping[str, Run]
    results: Results

    def accuracies(self, target: str, per_class: int) -> Accuracies:
        """Accuracies by method and seed; methods without a run are left out."""
        runs = {
            method: {
                seed: self.experiment.run(method, self.choices[method], target, per_class, seed) for seed in self.seeds
            }
            for method in self.experiment.methods
            if method in self.choices
        }
        variants = self.experiment.variants if DEFAULT in self.choices else ()
        runs |= {
            name: {
                seed: self.experiment.variant(name, self.choices[DEFAULT], target, per_class, seed)
                for seed in self.seeds
            }
            for name in variants
        }
        return _present(runs, self.results)

    @property
    def seeds(self) -> range:
        """The paired seeds."""
        return range(self.experiment.seeds)

    def columns(self, target: str) -> dict[int, Accuracies]:
        """Accuracies by labels per class; a curve needs two points, one of which another experiment may have made."""
        found = {count: self.accuracies(target, count) for count in self.experiment.per_class}
        # The default alone, which other experiments run too, is no ablation.
        needed = self.experiment.variants or self.experiment.methods
        found = {count: values for count, values in found.items() if any(name in values for name in needed)}
        return found if len(found) >= min(2, len(self.experiment.per_class)) else {}

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to report."""
        return not any(self.columns(target) for target in self.experiment.targets)


def _present(runs: Mapping[str, Mapping[int, Run]], results: Results) -> Accuracies:
    found = {
        name: {seed: results[run]["accuracy"] for seed, run in by_seed.items() if run in results}
        for name, by_seed in runs.items()
    }
    return {name: values for name, values in found.items() if values}


def gather(results: Results, experiments: Mapping[str, Experiment] = EXPERIMENTS) -> dict[str, Found]:
    """The experiments of which something can be said."""
    found = {}
    for name, experiment in experiments.items():
        choices = {
            method: choice
            for method in experiment.tuned_methods()
            if (choice := experiment.tuning.choice_or_none(method, results)) is not None
        }
        one = Found(name, experiment, choices, results)
        if not one.is_empty:
            found[name] = one
    return found


def label(method: str) -> str:
    """The name of a method, or of a variant, in tables."""
    return METHODS[method].label if method in METHODS else method


def comparison_table(found: Found, target: str, per_class: int) -> list[str]:
    """Accuracy of each method, and what the default gains on it."""
    accuracies = found.accuracies(target, per_class)
    comparisons = {}
    if DEFAULT in accuracies:
        others = {name: values for name, values in accuracies.items() if name != DEFAULT}
        comparisons = compare(accuracies[DEFAULT], others)
    seeds = {len(values) for values in accuracies.values()}
    lines = [
        f"**{NAMES[target]}**, {per_class} labels per class, {_span(seeds)} paired seeds",
        "",
        "| method | accuracy, % | default gains, points | p (Holm) |",
        "|---|---|---|---|",
    ]
    for name, values in accuracies.items():
        mean = str(estimate(list(values.values())))
        if name == DEFAULT:
            lines.append(f"| **{label(name)}** | **{mean}** | | |")
        elif name in comparisons:
            one = comparisons[name]
            lines.append(f"| {label(name)} | {mean} | {signed(one.gain)} | {p_value(one.corrected)} |")
        else:
            lines.append(f"| {label(name)} | {mean} | | |")
    return [*lines, ""]


def variant_table(found: Found, target: str, per_class: int) -> list[str]:
    """Accuracy of each variant, and its paired difference to the default as it is."""
    accuracies = found.accuracies(target, per_class)
    base = accuracies.get(DEFAULT, {})
    lines = ["| variant | accuracy, % | against the default, points | seeds |", "|---|---|---|---|"]
    for name, values in accuracies.items():
        gains = [values[seed] - base[seed] for seed in values.keys() & base.keys()]
        difference = "" if name == DEFAULT or not gains else signed(estimate(gains))
        lines.append(f"| {label(name)} | {estimate(list(values.values()))} | {difference} | {len(values)} |")
    return [*lines, ""]


def curve_table(found: Found, target: str) -> list[str]:
    """Accuracy of each method by the number of labels per class."""
    columns = found.columns(target)
    methods = [name for name in found.experiment.methods if any(name in values for values in columns.values())]
    lines = [
        f"**{NAMES[target]}**, accuracy in % by labels per class",
        "",
        "| method | " + " | ".join(f"{count}" for count in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method in methods:
        cells = [
            str(estimate(list(values[method].values()))) if method in values else "" for values in columns.values()
        ]
        lines.append(f"| {label(method)} | " + " | ".join(cells) + " |")
    seeds = {len(values) for column in columns.values() for values in column.values()}
    return [*lines, "", f"Paired seeds: {_span(seeds)}.", ""]


def choices_table(found: Found) -> list[str]:
    """What tuning chose; a star marks a weight at the edge of its candidates."""
    lines = ["| method | learning rate | weight decay | weight | validation accuracy, % |", "|---|---|---|---|---|"]
    for name, choice in found.choices.items():
        edge = " *" if found.experiment.tuning.edge(name, found.results) else ""
        weight = f"{choice.weight:g}{edge}" if METHODS[name].weights else ""
        mean = found.experiment.tuning.mean(choice, found.results)
        lines.append(f"| {label(name)} | {choice.lr:g} | {choice.weight_decay:g} | {weight} | {mean:.1f} |")
    return [*lines, ""]


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
            reached += _main_goals(found["main"].accuracies(target, 10), NAMES[target], points)
    for name in ("compression", "digits"):
        if name in found:
            experiment = found[name].experiment
            accuracies = found[name].accuracies(experiment.targets[0], experiment.per_class[0])
            reached += _best_rival_goal(accuracies, f"{NAMES[experiment.targets[0]]}, compression", 0.0)
    for name in ("curve", "curve-compression"):
        if name in found:
            for target in found[name].experiment.targets:
                reached += _best_rival_goal(found[name].accuracies(target, 50), f"{NAMES[target]}, 50 per class", 3.0)
    if "copied" in found:
        for target in found["copied"].experiment.targets:
            reached += _not_worse_goal(found["copied"].accuracies(target, 10), NAMES[target])
    if "other" in found:
        for target in found["other"].experiment.targets:
            reached += _recipe_goals(found["other"].accuracies(target, 10), NAMES[target])
    for name, where in (("wide", "a wider pair"), ("residual", "a residual pair"), ("transformer", "transformers")):
        if name in found:
            experiment = found[name].experiment
            for target in experiment.targets:
                accuracies = found[name].accuracies(target, experiment.per_class[0])
                reached += _ordering_goals(accuracies, f"{NAMES[target]}, {where}")
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


def _best_rival_goal(accuracies: Accuracies, where: str, points: float) -> list[Goal]:
    """The default against the best rival, and the same for the default with KD, the recipe of the guide."""
    rival = best_rival(accuracies)
    if rival is None:
        return []
    found = []
    subjects = {DEFAULT: "the default", "ot-blocks+kd": "the default with KD", "ot-blocks+lwf": "the default with KD"}
    for method, subject in subjects.items():
        comparisons = compare(accuracies.get(method, {}), {rival: accuracies[rival]})
        if rival in comparisons:
            gain = comparisons[rival].gain
            claim = f"{where}: {subject} is ahead of the best rival by ≥ {points:g} points"
            measured = f"{signed(gain)} against {label(rival)}, p {p_value(comparisons[rival].corrected)}"
            found.append(Goal(claim, measured, gain.mean >= points))
    return found


def _main_goals(accuracies: Accuracies, where: str, points: float) -> list[Goal]:
    if DEFAULT not in accuracies:
        return []
    others = {name: values for name, values in accuracies.items() if name != DEFAULT}
    comparisons = compare(accuracies[DEFAULT], others)
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
    for name in ("random", "ot-penultimate"):
        if name in comparisons:
            one = comparisons[name]
            claim = f"{where}: the default beats {label(name)}, corrected p < 0.05"
            measured = f"{signed(one.gain)}, p {p_value(one.corrected)}"
            found.append(Goal(claim, measured, one.gain.mean > 0 and one.corrected < 0.05))
    return found


def _not_worse_goal(accuracies: Accuracies, where: str) -> list[Goal]:
    if DEFAULT not in accuracies:
        return []
    comparisons = compare(accuracies[DEFAULT], rivals(accuracies))
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
        *_beats_goals(accuracies, DEFAULT, ("plain", "random"), f"{where}: the default", 0.05),
        *_best_rival_goal(accuracies, where, 0.0),
    ]


def _beats_goals(
    accuracies: Accuracies, method: str, others: tuple[str, ...], subject: str, level: float
) -> list[Goal]:
    if method not in accuracies:
        return []
    comparisons = compare(accuracies[method], {name: accuracies[name] for name in others if name in accuracies})
    return [
        Goal(
            f"{subject} beats {label(name)}, corrected p < {level:g}",
            f"{signed(one.gain)}, p {p_value(one.corrected)}",
            one.gain.mean > 0 and one.corrected < level,
        )
        for name, one in comparisons.items()
    ]


def signed(gain: Estimate) -> str:
    """A difference with its sign."""
    half = "" if math.isnan(gain.half_width) else f" ± {gain.half_width:.1f}"
    return f"{gain.mean:+.1f}{half}"


def p_value(p: float) -> str:
    """As in tables."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def command(*names: str) -> str:
    """The command that makes the runs of experiments."""
    return f"`python -m benchmarks.transfer --experiments {' '.join(names)}`"


def _span(counts: set[int]) -> str:
    """One number, or the range of several."""
    return f"{min(counts)}" if len(counts) == 1 else f"{min(counts)}–{max(counts)}"
