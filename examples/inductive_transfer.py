"""Inductive transfer: a copy of a teacher of one alphabet is fine-tuned on another, held close to the teacher."""

from __future__ import annotations

import copy

from torch import nn

from examples import report
from examples.glyphs import glyphs
from examples.networks import TEACHER_WIDTHS
from lightning_otrt import OTRTCallback

LAYERS = {f"net.blocks.{block}": f"blocks.{block}" for block in range(3)}
TITLE = "Fine-tuned from A–Z and 0–9 to a–z, 10 labels per class"


def main() -> None:
    """Trains a teacher on A-Z and 0-9, then fine-tunes copies of it on a-z without and with transport."""
    options = report.options(__doc__, "inductive_transfer.png")
    teacher = report.train_teacher(glyphs("source", "train"), steps=options.steps(800))
    test = glyphs("lowercase", "test")

    def copy_with_new_head() -> nn.Module:
        student = copy.deepcopy(teacher.net)
        student.head = nn.Linear(TEACHER_WIDTHS[-1], report.num_classes(test))
        return student

    students = report.compare(
        copy_with_new_head,
        lambda seed: glyphs("lowercase", "train", per_class=10, seed=seed + 1),
        test,
        lambda: OTRTCallback(teacher.net, LAYERS, student_root="net"),
        steps=options.steps(400),
        seeds=options.seeds,
        lr=3e-3,
        weight_decay=1e-2,
    )
    report.print_table(TITLE, students)
    report.save_figure(options.figure, {TITLE: students})


if __name__ == "__main__":
    main()
