"""Model compression: a student with half the channels learns the teacher's task from few labelled images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch.utils.data import TensorDataset

from examples import report
from examples.digits import digits
from examples.glyphs import glyphs
from examples.networks import STUDENT_WIDTHS, ConvNet
from lightning_otrt import OTRTCallback

LAYERS = {f"net.blocks.{block}": f"blocks.{block}" for block in range(3)}


def compress(
    draw: Callable[..., TensorDataset],
    options: report.Options,
    *,
    per_class: int,
    teacher_steps: int,
    steps: int,
    **optimizer: float,
) -> tuple[float, report.Accuracies]:
    """Trains a teacher on all images, then students on few; returns the teacher's accuracy and the students'."""
    test = draw("test")
    teacher = report.train_teacher(draw("train"), steps=options.steps(teacher_steps))
    students = report.compare(
        partial(ConvNet, STUDENT_WIDTHS, report.num_classes(test)),
        lambda seed: draw("train", per_class=per_class, seed=seed + 1),
        test,
        lambda: OTRTCallback(teacher.net, LAYERS, student_root="net"),
        steps=options.steps(steps),
        seeds=options.seeds,
        **optimizer,
    )
    return report.accuracy(teacher, test), students


def main() -> None:
    """Compresses a classifier of printed characters and one of handwritten digits."""
    options = report.options(__doc__, "compression.png")
    # The learning rates and weight decays that suit plain training best (benchmarks/results/transfer.md).
    results = {
        "Printed A–Z and 0–9, 10 labels per class": compress(
            partial(glyphs, "source"),
            options,
            per_class=10,
            teacher_steps=800,
            steps=400,
            lr=1.0,
            weight_decay=0.03,
        ),
        "Handwritten digits, 5 labels per class": compress(digits, options, per_class=5, teacher_steps=300, steps=300),
    }
    for title, (_, students) in results.items():
        report.print_table(title, students)
    report.save_figure(
        options.figure,
        {title: students for title, (_, students) in results.items()},
        {title: teacher for title, (teacher, _) in results.items()},
    )


if __name__ == "__main__":
    main()
