"""Draw the figures of the page "How it works": ``python -m docs.figures.how_it_works``.

A teacher of capital letters and figures, and a student with half its channels that learns small letters from ten
pictures of each: those of ``examples.transfer_compression``. Needs no download and takes two minutes.
"""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader

from docs.figures.drawing import GREY, correlations, save
from examples.glyphs import glyphs
from examples.networks import STUDENT_WIDTHS, Classifier, ConvNet
from examples.report import num_classes, train_teacher
from lightning_otrt import OTRTCallback, neurons, transport_distance

STEPS, EVERY = 400, 10
BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
#: The block of the pictures of neurons and plans.
BLOCK = "blocks.1"
COLOURS = ("#0072B2", "#D55E00", "#009E73")


def seen(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Neurons of each block ``(N, observations)``, maps averaged to 4 × 4 as the term does."""
    found = {}
    mode = net.training
    with torch.no_grad():
        x = images
        net.eval()
        for name, block in zip(BLOCKS, net.blocks, strict=True):
            x = block(x)
            found[name] = neurons(x, neuron_axis=1)
    net.train(mode)
    return found


class Watch(pl.Callback):
    """Distances of the blocks on pictures that the student does not learn from, every few steps."""

    def __init__(self, teacher: nn.Module, images: Tensor) -> None:
        self.images, self.teacher = images, seen(teacher, images)
        self.distances: dict[str, list[float]] = {name: [] for name in BLOCKS}

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *args: object) -> None:
        """Before the first of these steps."""
        if trainer.global_step % EVERY == 0:
            for name, student in seen(module.net, self.images).items():
                self.distances[name].append(float(transport_distance(student, self.teacher[name]).value))


def trained(teacher: nn.Module, test: Tensor, classes: int, callbacks: list[pl.Callback]) -> nn.Module:
    """A student; equal pictures, initial weights and order of batches in each call."""
    pl.seed_everything(0, verbose=False)
    few = glyphs("lowercase", "train", per_class=10)
    task = Classifier(ConvNet(STUDENT_WIDTHS, classes), classes, lr=1.0, weight_decay=0.03)
    trainer = pl.Trainer(
        max_steps=STEPS,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    trainer.fit(task, DataLoader(few, 64, shuffle=True, drop_last=True))
    return task.net


def draw_neurons(images: Tensor, rows: Mapping[str, Tensor]) -> Figure:
    """Pictures, and below them one neuron of each network at 4 × 4 positions."""
    count = len(images)
    figure, axes = plt.subplots(1 + len(rows), count, figsize=(0.8 * count + 1.6, 0.85 * (1 + len(rows))))
    for column, picture in enumerate(images):
        axes[0, column].imshow(picture[0], cmap="gray_r")
        for row, values in enumerate(rows.values(), start=1):
            axes[row, column].imshow(
                values[column], cmap="Blues", vmin=values.quantile(0.02), vmax=values.quantile(0.98)
            )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=True, color=GREY, linewidth=0.5)
    for axis, label in zip(axes[:, 0], ("pictures", *rows), strict=True):
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    return figure


def draw_plan(cost: Tensor, plan: Tensor, value: float) -> Figure:
    """The cost, the plan, and the cost again with each teacher neuron next to the student neurons that follow it."""
    order = plan.T.argmax(1).argsort()
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.5), layout="constrained")
    share = plan / plan.sum(1, keepdim=True)
    panels = (
        (cost, "viridis", "cost M = 1 − r", 0.0, float(cost.max())),
        (share, "Blues", f"plan P; ⟨P, M⟩ = {value:.2f}", 0.0, float(share.max())),
        (cost[:, order], "viridis", "M in the order of P", 0.0, float(cost.max())),
    )
    for axis, (values, colours, title, least, most) in zip(axes, panels, strict=True):
        image = axis.imshow(values, cmap=colours, vmin=least, vmax=most, aspect="auto", interpolation="nearest")
        axis.set_title(title)
        axis.set(xlabel="teacher neuron", ylabel="student neuron")
        figure.colorbar(image, ax=axis, shrink=0.9)
    return figure


def draw_training(without: Mapping[str, list[float]], with_term: Mapping[str, list[float]]) -> Figure:
    """The distance of each block over the steps."""
    figure, axis = plt.subplots(figsize=(5.6, 3.0), layout="constrained")
    steps = range(0, EVERY * len(without[BLOCK]), EVERY)
    for colour, name in zip(COLOURS, BLOCKS, strict=True):
        axis.plot(steps, without[name], color=colour, linestyle=":")
        axis.plot(steps, with_term[name], color=colour, label=name)
    axis.plot([], [], color=GREY, linestyle=":", label="without the term")
    axis.set(xlabel="step", ylabel="distance, on new pictures", ylim=(0, None))
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    axis.grid(alpha=0.25)
    return figure


def draw_rotations(layer: Tensor) -> Figure:
    """What a plan and a rotation make of two copies of a layer: one in another order, one turned."""
    generator = torch.Generator().manual_seed(0)
    layer = layer - layer.mean(1, keepdim=True)
    turn, _ = torch.linalg.qr(torch.randn(len(layer), len(layer), generator=generator))
    copies = {
        "another order": layer[torch.randperm(len(layer), generator=generator)],
        "rotated": turn @ layer,
    }
    figure, axes = plt.subplots(1, 4, figsize=(7.2, 2.5), layout="constrained")
    panels = [
        (name, copy, plan, cost)
        for name, copy in copies.items()
        for plan, cost in (("sinkhorn", "correlation"), ("orthogonal", "covariance"))
    ]
    for axis, (name, copy, plan, cost) in zip(axes, panels, strict=True):
        found = transport_distance(copy, layer, plan=plan, cost=cost)
        most = float(found.plan.abs().max())
        axis.imshow(found.plan, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
        axis.set_title(f'{name}\nplan="{plan}"\ndistance {abs(float(found.value)):.2f}', fontsize=9)
        axis.set(xlabel="teacher neuron", xticks=[], yticks=[])
    axes[0].set_ylabel("student neuron")
    return figure


def main() -> None:
    """Train a teacher and two students, and draw."""
    torch.set_num_threads(1)
    teacher = train_teacher(glyphs("source", "train"), steps=800).net
    data = glyphs("lowercase", "test")
    pictures, classes = data.tensors[0][:512], num_classes(data)
    watches = [Watch(teacher, pictures), Watch(teacher, pictures)]
    trained(teacher, pictures, classes, [watches[0]])
    term = OTRTCallback(teacher, {f"net.{name}": name for name in BLOCKS}, student_root="net")
    student = trained(teacher, pictures, classes, [term, watches[1]])

    y, x = seen(student, pictures)[BLOCK], seen(teacher, pictures)[BLOCK]
    result = transport_distance(y, x)
    matched = result.plan.argmax(1)
    strength = correlations(y, x)[torch.arange(len(y)), matched]
    row = int(strength.argmax())
    some = torch.arange(0, len(pictures), len(pictures) // 7)[:7]
    maps = [values.unflatten(0, (-1, 4, 4)) for values in (y[row], x[matched[row]], y[row - 1])]
    labels = ("student neuron", "its match in\nthe teacher", "another one of\nthe student")
    save("neurons", lambda: draw_neurons(pictures[some], {a: b[some] for a, b in zip(labels, maps, strict=True)}))
    save("plan", lambda: draw_plan(result.cost, result.plan, float(result.value)))
    save("training", lambda: draw_training(watches[0].distances, watches[1].distances))
    save("rotations", lambda: draw_rotations(x))
    print(f"correlation of the pair shown: {strength[row]:.2f}")


if __name__ == "__main__":
    main()
