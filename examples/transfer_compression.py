"""Transfer and compression: a student with half the channels learns a new alphabet, helped by a teacher of another."""

from __future__ import annotations

from functools import partial

from examples import report
from examples.glyphs import glyphs
from examples.networks import STUDENT_WIDTHS, ConvNet
from lightning_otrt import OTRTCallback

LAYERS = {f"net.blocks.{block}": f"blocks.{block}" for block in range(3)}
TITLE = "From A–Z and 0–9 to a–z, 10 labels per class"


def main() -> None:
    """Trains a teacher on A-Z and 0-9, then students on a-z without and with it."""
    options = report.options(__doc__, "transfer_compression.png")
    teacher = report.train_teacher(glyphs("source", "train"), steps=options.steps(800))
    test = glyphs("lowercase", "test")
    students = report.compare(
        partial(ConvNet, STUDENT_WIDTHS, report.num_classes(test)),
        lambda seed: glyphs("lowercase", "train", per_class=10, seed=seed + 1),
        test,
        lambda: OTRTCallback(teacher.net, LAYERS, student_root="net"),
        steps=options.steps(400),
        seeds=options.seeds,
        # What suits plain training best (benchmarks/results/transfer.md).
        lr=1.0,
        weight_decay=0.03,
    )
    report.print_table(TITLE, students)
    report.save_figure(options.figure, {TITLE: students})


if __name__ == "__main__":
    main()
