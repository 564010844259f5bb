"""The figures of the benchmark, each drawn where its data exist, in colours of Okabe and Ito."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.evidence.methods import DEFAULT, METHODS
from benchmarks.evidence.report import NAMES, Found, command, label
from benchmarks.evidence.runs import Row
from benchmarks.evidence.statistics import estimate
from lightning_otrt.analysis.plot_style import BASELINE, CURVE_COLOURS, plain_axes, plan_colours

COLOURS = (*CURVE_COLOURS, BASELINE)
RIVAL, OURS = CURVE_COLOURS[4], CURVE_COLOURS[1]


def draw(found: Mapping[str, Found], folder: Path) -> dict[str, tuple[str, str]]:
    """Draw what can be drawn.

    Args:
        found: Experiments with runs.
        folder: Where the files ``evidence_<name>.png`` go.

    Returns:
        By file name, a caption and the command behind the figure.
    """
    drawn = {}
    painters: dict[str, Callable[[Mapping[str, Found]], tuple[Any, str, str] | None]] = {
        "accuracy": accuracy,
        "weight": weight,
        "labels": labels,
        "plans": plans,
        "identity": identity,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, paint in painters.items():
        if (painted := paint(found)) is not None:
            figure, caption, made_by = painted
            path = folder / f"evidence_{name}.png"
            figure.savefig(path, dpi=110)
            plt.close(figure)
            drawn[path.name] = (caption, made_by)
    return drawn


def accuracy(found: Mapping[str, Found]) -> tuple[Any, str, str] | None:
    """Accuracy with 95 % intervals of all methods, one panel for each target."""
    names = [name for name in ("main", "compression", "digits", "copied", "other") if name in found]
    panels = [(found[name], target) for name in names for target in found[name].experiment.targets]
    if not panels:
        return None
    rows = (len(panels) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(11, 4.6 * rows), squeeze=False, layout="constrained")
    for axis, (one, target) in zip(axes.flat, panels, strict=False):
        values = one.accuracies(target, one.experiment.per_class[0])
        values = dict(sorted(values.items(), key=lambda item: estimate(list(item[1].values())).mean))
        for place, (method, by_seed) in enumerate(values.items()):
            mean = estimate(list(by_seed.values()))
            colour = OURS if METHODS[method].ours else BASELINE if method in ("plain", "random") else RIVAL
            axis.plot(list(by_seed.values()), [place] * len(by_seed), ".", color=colour, alpha=0.4, markersize=4)
            axis.errorbar(mean.mean, place, xerr=mean.half_width, color=colour, marker="o", capsize=3)
        axis.set_yticks(range(len(values)), [label(method) for method in values], fontsize=8)
        setting = one.experiment.tuning.setting
        axis.set(title=f"setting {setting}, {NAMES[target]}", xlabel="test accuracy, %")
        plain_axes(axis, "x")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    caption = "Accuracy with 95 % intervals; dots are seeds; orange: optimal transport, blue: rivals, grey: baselines"
    return figure, caption, command(*names)


def weight(found: Mapping[str, Found]) -> tuple[Any, str, str] | None:
    """Sensitivity to the weight of the transfer term, on a-z validation."""
    if "weight" not in found:
        return None
    one = found["weight"]
    accuracies = one.accuracies("lowercase", one.experiment.per_class[0])
    weights = [float(name) for name in accuracies]
    means = [estimate(list(values.values())) for values in accuracies.values()]
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    axis.errorbar(weights, [m.mean for m in means], [m.half_width for m in means], color=OURS, marker="o", capsize=3)
    axis.set_xscale("log", base=2)
    axis.set_xticks(weights, [f"{value:g}" for value in weights])
    axis.set(xlabel="weight of the term", ylabel="validation accuracy, %", title=label(DEFAULT))
    plain_axes(axis, "y")
    return figure, "Sensitivity to the weight, a–z validation fonts, 10 labels per class", command("weight")


def labels(found: Mapping[str, Found]) -> tuple[Any, str, str] | None:
    """What each method gains on plain training against the number of labels."""
    names = [name for name in ("curve", "curve-compression") if name in found]
    panels = [(found[name], target) for name in names for target in found[name].experiment.targets]
    panels = [(one, target) for one, target in panels if _gains(one, target)]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (one, target) in zip(axes[0], panels, strict=True):
        for (method, gains), colour in zip(_gains(one, target).items(), COLOURS, strict=False):
            means = [estimate(values) for values in gains.values()]
            width = 2.4 if method == DEFAULT else 1.2
            axis.errorbar(
                list(gains),
                [m.mean for m in means],
                [m.half_width for m in means],
                color=OURS if method == DEFAULT else colour if colour != OURS else COLOURS[-1],
                marker="o",
                markersize=4,
                capsize=2,
                linewidth=width,
                label=label(method),
            )
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xticks(one.experiment.per_class, [f"{count}" for count in one.experiment.per_class])
        axis.minorticks_off()
        axis.set(title=NAMES[target], xlabel="labels per class", ylabel="gain on plain, points")
        plain_axes(axis, "y")
    axes[0][0].legend(fontsize=7, frameon=False)
    return figure, "Gain on plain training against labels per class, paired, 95 % intervals", command(*names)


def _gains(found: Found, target: str) -> dict[str, dict[int, list[float]]]:
    gains: dict[str, dict[int, list[float]]] = {}
    for count in found.experiment.per_class:
        accuracies = found.accuracies(target, count)
        plain = accuracies.get("plain", {})
        for method, values in accuracies.items():
            paired = [values[seed] - plain[seed] for seed in values.keys() & plain.keys()]
            if method != "plain" and paired:
                gains.setdefault(method, {})[count] = paired
    return gains


def plans(found: Mapping[str, Found]) -> tuple[Any, str, str] | None:
    """Heat maps of the plan of the first block over training."""
    rows = {name: row for name in ("plans-1", "plans-1x", "plans-3") if (row := _plan_row(found, name)) is not None}
    if not rows:
        return None
    columns = max(len(row["plans"]) for row in rows.values())
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2 * columns, 2.1 * len(rows)), squeeze=False, layout="constrained"
    )
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        for axis, (step, layers) in zip(line, row["plans"].items(), strict=False):
            plan = next(iter(layers.values()))["plan"]
            image = axis.imshow(plan, cmap=plan_colours(), vmin=0, vmax=1, aspect="auto")
            axis.set_title(f"step {step}", fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel("teacher neuron", fontsize=8)
        line[0].set_ylabel(f"setting {name.removeprefix('plans-')}\nstudent neuron", fontsize=8)
        figure.colorbar(image, ax=line, label="share of a student neuron", shrink=0.8)
    caption = "Plan of the first block over training; columns are teacher neurons (Greek, seed 0)"
    return figure, caption, command(*rows)


def identity(found: Mapping[str, Found]) -> tuple[Any, str, str] | None:
    """Mass off the identity over training, where student and teacher have equal widths."""
    rows = {name: row for name in ("plans-1", "plans-1x") if (row := _plan_row(found, name)) is not None}
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
    for (name, row), style in zip(rows.items(), ("-", "--"), strict=False):
        steps = [int(step) for step in row["plans"]]
        for layer, colour in zip(next(iter(row["plans"].values())), COLOURS, strict=False):
            shares = [layers[layer]["off_identity"] for layers in row["plans"].values()]
            setting = name.removeprefix("plans-")
            axis.plot(steps, shares, style, color=colour, marker="o", markersize=4, label=f"setting {setting}, {layer}")
    axis.set(xlabel="step", ylabel="mass off the identity", ylim=(-0.03, 1.03))
    axis.legend(fontsize=7, frameon=False)
    plain_axes(axis, "y")
    starts = {"plans-1": "copied from the teacher (1)", "plans-1x": "from another network (1x)"}
    caption = f"Mass of the plan off the identity: {', '.join(starts[name] for name in rows)}; Greek, seed 0"
    return figure, caption, command(*rows)


def _plan_row(found: Mapping[str, Found], name: str) -> Row | None:
    if name not in found:
        return None
    one = found[name]
    run = one.experiment.run(DEFAULT, one.choices[DEFAULT], "greek", one.experiment.per_class[0], 0)
    return one.results.get(run)
