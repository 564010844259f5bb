"""Draw the figure of the README: what training does to neurons, and what it buys. ``python -m docs.figures.hero``.

Left: a ResNet-10 learns 22 kinds of emoji from five pictures of each, without and with ImageNet's EfficientNet-Lite0 as
teacher. Weights and pictures come from the packages that ``python -m benchmarks.real`` names. Right: what that
benchmark measured.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.evidence.report import Found, gather
from benchmarks.evidence.runs import Results, Run
from benchmarks.evidence.statistics import estimate
from benchmarks.real.__main__ import RESULTS
from benchmarks.real.cells import CELLS
from benchmarks.real.comparisons import accuracies
from benchmarks.real.data import Samples
from benchmarks.real.methods import DEFAULT, METHODS, PLAIN
from benchmarks.real.recorded import Taps, observations
from benchmarks.real.training import fit, new_student, problem_of, recorded_of, teacher_of
from docs.figures.drawing import GREY, best_order, correlations, save
from lightning_otrt import LayerPair

#: Cells of the benchmark on the right, with what their panels say.
SHOWN = {
    "emoji-5-resnet10": "EfficientNet-Lite0 → ResNet-10\n22 kinds of emoji, 5 of each",
    "sections-20-bert2": "MiniLM → BERT 2 × 128\n12 kinds of texts, 20 of each",
}
#: Rows on the right, from the top, and whether they are ours.
ROWS = {
    PLAIN: ("no teacher", False),
    "kd": ("distillation\nof logits", False),
    "cka": ("CKA", False),
    "random-orthogonal+kd": ("control: random rotation\n+ distillation", False),
    "transport+kd": ("transport\n+ distillation", True),
    "orthogonal+kd": ("rotation\n+ distillation", True),
}
#: Which of the pairs of layers is shown on the left.
LAYER = 2
#: The weight there: the default.
WEIGHT = 32.0


def found() -> dict[str, Found]:
    """What the benchmark measured."""
    return {name: gather(Results(RESULTS / f"{name}.jsonl"), {name: CELLS[name]})[name] for name in SHOWN}


def neurons() -> list[tuple[str, Tensor]]:
    """Correlations of student and teacher neurons on new pictures, for three states of the student, with titles."""
    torch.set_num_threads(1)
    one = next(iter(found().values()))
    states = []
    for method, title in ((PLAIN, "{} steps alone"), (DEFAULT, "{} steps with transport")):
        run = replace(one.experiment.run(method, one.choices[method], "emoji", 5, 0), weight=WEIGHT)
        problem, teacher, pair = problem_of(run), teacher_of("EfficientNet-Lite0"), _pair(run)
        student = new_student(run, problem.num_classes)
        if not states:
            states.append(("before training", _correlations(student, teacher, pair, problem.held_out)))
        fit(run, METHODS[method], student, problem.train)
        states.append((title.format(run.steps), _correlations(student, teacher, pair, problem.held_out)))
    return states


def _pair(run: Run) -> LayerPair:
    return recorded_of(run).pairs[LAYER]


def _correlations(student: nn.Module, teacher: nn.Module, pair: LayerPair, samples: Samples) -> Tensor:
    sides = []
    for net, layer in ((student, pair.student), (teacher, pair.teacher)):
        seen = []
        with torch.no_grad(), Taps(net.eval(), [layer]) as taps:
            for batch in samples.chunks():
                batch(net)
                seen.append(observations(taps.outputs[0], None).flatten(0, 1))
        sides.append(torch.cat(seen).T)
    return correlations(*sides)


def draw(states: list[tuple[str, Tensor]], measured: dict[str, Found]) -> Figure:
    """Three heat maps above, one panel of accuracies for each cell below."""
    figure = plt.figure(figsize=(7.2, 5.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 0.95))
    maps = above.subplots(1, len(states))
    for axis, (title, values) in zip(maps, states, strict=True):
        ordered, strength = best_order(values)
        image = axis.imshow(ordered, cmap="RdBu_r", vmin=-0.8, vmax=0.8, interpolation="nearest")
        axis.set_title(f"{title}\nmean of a match: r = {strength:.2f}")
        axis.set(xlabel="teacher neuron", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    maps[0].set_ylabel("student neuron")
    above.colorbar(image, ax=maps, label="correlation r", shrink=0.9, pad=0.01)
    panels = below.subplots(1, len(measured), sharey=True)
    for axis, (name, one) in zip(panels, measured.items(), strict=True):
        values = accuracies(one)
        for row, (method, (_, ours)) in enumerate(ROWS.items()):
            result = estimate(list(values[method].values()))
            colour = "#D55E00" if ours else GREY
            axis.errorbar(result.mean, row, xerr=result.half_width, color=colour, marker="o", capsize=3)
            axis.annotate(
                f"{result.mean:.1f}", (result.mean, row), (0, 5), textcoords="offset points", ha="center", fontsize=8
            )
        axis.set_title(SHOWN[name])
        axis.set_xlabel("test accuracy, %")
        axis.set_yticks(range(len(ROWS)), [text for text, _ in ROWS.values()])
        axis.set_ylim(len(ROWS) - 0.5, -0.7)
        axis.grid(axis="x", alpha=0.25)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    return figure


if __name__ == "__main__":
    states, measured = neurons(), found()
    save("hero", lambda: draw(states, measured))
