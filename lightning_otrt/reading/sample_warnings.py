"""Warnings where the observations of student and teacher may be of different samples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.layers.trace import Trace

__all__ = ["warn_of_other_samples"]


def warn_of_other_samples(pairs: Sequence[LayerPair], student: Trace, teacher: Trace) -> None:
    """Warn once of noise that each network draws for itself, of samples in another order, and of unclear axes.

    Args:
        pairs: The resolved pairs.
        student: Trace of the student.
        teacher: Trace of the teacher.
    """
    sides = (
        ("student", student, [pair.student for pair in pairs]),
        ("teacher", teacher, [pair.teacher for pair in pairs]),
    )
    drawing = [f"the {side} ({trace.layer(trace.root).kind})" for side, trace, _ in sides if trace.draws_random]
    if drawing:
        warnings.warn(
            f"The forward of {' and that of '.join(drawing)} draws random numbers although it runs in evaluation mode, "
            "such as noise, time steps or masks. Unless both draw the same ones in the same order, what is matched "
            "belongs to other noise. Draw them outside and pass them as an argument, name the network that gets them "
            "as `student_root`, or give the teacher the same ones with `teacher_inputs`.",
            stacklevel=2,
        )
    moved: dict[str, list[str]] = {"student": [], "teacher": []}
    for pair in pairs:
        found = pair.student in student.reordered, pair.teacher in teacher.reordered
        if found[0] != found[1]:
            side, name = ("student", pair.student) if found[0] else ("teacher", pair.teacher)
            moved[side].append(name)
    for side, layers in moved.items():
        if layers:
            warnings.warn(
                f"The {side} layers {layers} hold the samples in another order than the inputs, as where they are "
                "sorted by length, and those that they are matched to do not: different samples are matched. Sort the "
                "batch before both networks, or pack with enforce_sorted=False in place of sorting.",
                stacklevel=2,
            )
    for side, trace, layers in sides:
        unclear = sorted({name for name in layers if name in trace.unclear_axes})
        if unclear:
            warnings.warn(
                f"The first batch has as many samples as its sequences have positions ({trace.batch_size}), and "
                f"nothing tells which axis of the {side} layers {unclear} holds the samples: it is taken to be axis "
                f"{trace.layer(unclear[0]).batch_axis}. Begin with a batch of another size, or set `batch_first` on "
                "the network.",
                stacklevel=2,
            )
