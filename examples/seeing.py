"""See what is transferred: a weight from gradients, layers against layers before and after, plans and curves."""

from __future__ import annotations

import copy
import csv
import tempfile
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from matplotlib import pyplot as plt
from torch.utils.data import DataLoader

from examples import report
from examples.glyphs import glyphs
from examples.networks import STUDENT_WIDTHS, Classifier, ConvNet
from lightning_otrt import (
    OTRTCallback,
    OTRTMonitor,
    compare_representations,
    plot_history,
    plot_plan,
    suggest_weight,
)

BLOCKS = [f"blocks.{block}" for block in range(3)]


def main() -> None:
    """Trains a teacher on A-Z and 0-9, then one student on a-z with it, and looks at the transfer."""
    options = report.options(__doc__, "seeing.png")
    few, test = glyphs("lowercase", "train", per_class=10), glyphs("lowercase", "test")
    teacher = report.train_teacher(glyphs("source", "train"), steps=options.steps(800)).net
    pl.seed_everything(0, verbose=False)
    student = Classifier(ConvNet(STUDENT_WIDTHS, report.num_classes(test)), report.num_classes(test))
    untrained = copy.deepcopy(student.net)
    loader = DataLoader(few, 64, shuffle=True, drop_last=True)
    layers = {f"net.{name}": name for name in BLOCKS}
    callback = OTRTCallback(teacher, layers)
    print(suggest_weight(student, callback, loader), end="\n\n")

    logger = CSVLogger(tempfile.mkdtemp())
    pl.Trainer(
        max_steps=options.steps(400),
        callbacks=[callback, OTRTMonitor(every_n_steps=4, figures=False)],
        logger=logger,
        log_every_n_steps=4,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
    ).fit(student, loader)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    images = DataLoader(test, 256)
    for axis, net, title in ((axes[0, 0], untrained, "before training"), (axes[0, 1], student.net, "after training")):
        result = compare_representations(net, teacher, images, layers=BLOCKS, progress=False)
        result.plot(axis)
        axis.set_title(title, loc="right")
        print(f"{title}: {', '.join(f'{a} -> {b} {result.transport(a, b).value:.2f}' for a, b in result.pairing)}")
    last = result.transport(BLOCKS[-1], BLOCKS[-1])
    plot_plan(last.plan, title=f"{BLOCKS[-1]}, after training", distance=last.value, ax=axes[1, 0])
    names = {f"otrt/distance/{name}": f"distance, {name}" for name in layers}
    names["otrt/gradient_share"] = "share of the gradient"
    # The callback and the monitor write rows of their own, here for the same steps.
    seen = {name: {int(row["step"]): float(row[name]) for row in rows if row[name]} for name in names}
    steps = sorted(set.intersection(*map(set, seen.values())))
    plot_history({label: [seen[name][step] for step in steps] for name, label in names.items()}, steps, ax=axes[1, 1])
    axes[1, 1].set_title("training")
    figure.savefig(options.figure, dpi=100)
    print(f"\nFigure: {options.figure.resolve()}")


if __name__ == "__main__":
    main()
