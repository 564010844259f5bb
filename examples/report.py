"""What the examples share: quiet training runs with a progress bar, a table and a figure."""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from examples.networks import TEACHER_WIDTHS, Classifier, ConvNet
from lightning_otrt.analysis.plot_style import BASELINE, CURVE_COLOURS, plain_axes

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BATCH_SIZE = 64
COLOURS = (BASELINE, *CURVE_COLOURS)

Accuracies = dict[str, list[float]]


class LabelledProgressBar(TQDMProgressBar):
    """A progress bar that names the run."""

    def __init__(self, label: str, *, leave: bool = True) -> None:
        super().__init__(refresh_rate=10, leave=leave)
        self.label = label

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: object) -> None:
        """Names the run where Lightning names the epoch: a run is one epoch here."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(self.label)


@dataclass(frozen=True)
class Options:
    """The command line that all examples share.

    Attributes:
        seeds: Number of paired runs.
        quick: Whether to take a few steps only.
        figure: Where to save the figure.
    """

    seeds: int
    quick: bool
    figure: Path

    def steps(self, full: int) -> int:
        """The number of steps in place of `full`."""
        return full // 20 if self.quick else full


def options(description: str | None, figure: str) -> Options:
    """Reads the command line, and silences what would disturb the progress bars."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=4, help="number of paired runs")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that everything runs")
    parser.add_argument("--figure", type=Path, default=Path(figure), help="where to save the figure")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*does not have many workers", ".*LeafSpec.*is deprecated"):
        warnings.filterwarnings("ignore", message=message)
    # Threads do not pay for networks this small.
    torch.set_num_threads(1)
    return Options(**vars(parser.parse_args()))


def train(
    build: Callable[[], nn.Module],
    data: TensorDataset,
    *,
    steps: int,
    seed: int,
    label: str,
    callbacks: list[pl.Callback] | None = None,
    lr: float = 3e-2,
    weight_decay: float = 1.0,
) -> Classifier:
    """Builds a network and trains it for a number of steps; equal seeds give equal initial weights and batches."""
    pl.seed_everything(seed, verbose=False)
    classifier = Classifier(build(), num_classes(data), lr=lr, weight_decay=weight_decay)
    batch_size = min(BATCH_SIZE, len(data))
    # One long epoch, in which each image is seen equally often.
    sampler = RandomSampler(data, num_samples=steps * batch_size)
    _trainer(callbacks=[LabelledProgressBar(label), *(callbacks or [])], max_epochs=1).fit(
        classifier, DataLoader(data, batch_size, sampler=sampler)
    )
    return classifier


def train_teacher(data: TensorDataset, *, steps: int) -> Classifier:
    """Trains a teacher, whose many images need less weight decay than the few of a student."""
    build = partial(ConvNet, TEACHER_WIDTHS, num_classes(data))
    return train(build, data, steps=steps, seed=0, label="teacher", lr=1e-2, weight_decay=1e-2)


def compare(
    build: Callable[[], nn.Module],
    few: Callable[[int], TensorDataset],
    test: TensorDataset,
    transfer: Callable[[], pl.Callback],
    *,
    steps: int,
    seeds: int,
    **optimizer: float,
) -> Accuracies:
    """Trains students without and with transport, on the same images and from the same initial weights.

    Args:
        build: Makes a student.
        few: Makes the labelled images of a seed.
        test: Images for the test accuracy.
        transfer: Makes the callback of a run.
        steps: Number of steps.
        seeds: Number of paired runs.
        **optimizer: `lr` and `weight_decay` of both.

    Returns:
        Test accuracies of the seeds, in percent.
    """
    accuracies: Accuracies = {"plain": [], "OT": []}
    for seed in range(seeds):
        for method, values in accuracies.items():
            student = train(
                build,
                few(seed),
                steps=steps,
                seed=seed,
                label=f"student {seed + 1}/{seeds}, {method:5}",
                callbacks=[transfer()] if method == "OT" else [],
                **optimizer,
            )
            values.append(accuracy(student, test))
    return accuracies


def accuracy(classifier: Classifier, data: TensorDataset) -> float:
    """Test accuracy in percent."""
    results = _trainer(enable_progress_bar=False).test(classifier, DataLoader(data, 512), verbose=False)
    return 100 * results[0]["test/accuracy"]


def num_classes(data: TensorDataset) -> int:
    """Number of classes, each of which has at least one image."""
    return int(data.tensors[1].max()) + 1


def print_table(title: str, accuracies: Accuracies, measure: str = "test accuracy, %") -> None:
    """Prints means and paired differences to the first row, with 95 % confidence intervals."""
    reference = next(iter(accuracies.values()))
    seeds = f"{len(reference)} seed{'s' if len(reference) > 1 else ''}"
    print(f"\n{title}, {seeds}\n{'':24}{measure:>18}{'gain, points':>18}")
    for name, values in accuracies.items():
        gains = [value - base for value, base in zip(values, reference, strict=True)]
        gain = "" if values is reference else _interval(gains)
        print(f"{name:24}{_interval(values):>18}{gain:>18}")


def save_figure(
    path: Path,
    panels: dict[str, Accuracies],
    teachers: dict[str, float] | None = None,
    measures: dict[str, str] | None = None,
) -> None:
    """Saves one panel per title: the seeds as points, joined where they are paired; means with intervals."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (title, accuracies) in zip(axes[0], panels.items(), strict=True):
        positions = range(len(accuracies))
        for paired in zip(*accuracies.values(), strict=True):
            axis.plot(positions, paired, color="0.8", linewidth=1, zorder=1)
        for position, values, colour in zip(positions, accuracies.values(), COLOURS, strict=False):
            axis.scatter([position] * len(values), values, s=18, color=colour, alpha=0.5, zorder=2)
            mean = statistics.mean(values)
            axis.errorbar(position + 0.12, mean, _half_width(values), color=colour, marker="o", capsize=4, zorder=3)
            axis.annotate(f"{mean:.1f}", (position + 0.12, mean), (8, 0), textcoords="offset points", va="center")
        if teachers and title in teachers:
            axis.axhline(teachers[title], color="black", linestyle="--", linewidth=1)
            axis.annotate("teacher", (-0.35, teachers[title]), (0, -4), textcoords="offset points", va="top")
        axis.set(
            title=title.replace(", ", "\n"),
            ylabel=(measures or {}).get(title, "test accuracy, %"),
            xlim=(-0.4, len(accuracies) - 0.4),
        )
        axis.set_xticks(positions, list(accuracies))
        plain_axes(axis, "y")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"\nFigure: {path.resolve()}")


def _trainer(**settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="auto", devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False, **settings
    )


def _half_width(values: list[float]) -> float:
    if len(values) < 2:
        return math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return float(stats.t.ppf(0.975, len(values) - 1)) * spread


def _interval(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {_half_width(values):.1f}" if len(values) > 1 else "")
