"""Tables of what the runs found, as the page ``results/transfer.md``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.evidence.experiments import EXPERIMENTS, Experiment
from benchmarks.evidence.methods import DEFAULT, METHODS
from benchmarks.evidence.runs import Results, Run
from benchmarks.evidence.statistics import Comparison, Estimate, compare, estimate

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


def against_all(method: str, accuracies: Accuracies) -> dict[str, Comparison]:
    """A method against every other one of its table: the one family of tests that all claims about it are from."""
    others = {name: values for name, values in accuracies.items() if name != method}
    return compare(accuracies[method], others) if method in accuracies else {}


def label(method: str) -> str:
    """The name of a method, or of a variant, in tables."""
    return METHODS[method].label if method in METHODS else method


def comparison_table(found: Found, target: str, per_class: int) -> list[str]:
    """Accuracy of each method, and what the default gains on it."""
    accuracies = found.accuracies(target, per_class)
    comparisons = against_all(DEFAULT, accuracies)
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
