"""The chosen pairs as a table for the log."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_otrt.layers.mask_sources import LayerMasks
from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.layers.trace import Trace

__all__ = ["format_pairs"]


def format_pairs(
    pairs: Sequence[LayerPair],
    student: Trace,
    teacher: Trace,
    masks: Sequence[tuple[LayerMasks, LayerMasks]] = (),
    plans: Sequence[str] = (),
) -> str:
    """The pairs as a table with types, shapes and neuron axes; with padding masks, where there is any.

    Args:
        pairs: The pairs.
        student: Trace of the student.
        teacher: Trace of the teacher.
        masks: For each pair the masks of student and teacher.
        plans: For each pair the kind of plan, where that was chosen pair by pair.

    Example:
        >>> from lightning_otrt.layers.trace import TracedLayer, TracedTensor
        >>> trace = Trace((TracedLayer("fc", "Linear", calls=1, output=TracedTensor((4, 5), neuron_axis=1)),))
        >>> print(format_pairs([LayerPair("fc", "fc", neuron_axis=(1, 1))], trace, trace))
        student       shape  axis  teacher       shape  axis  weight
        fc (Linear)  (4, 5)     1  fc (Linear)  (4, 5)     1       1
    """
    rows = [["student", "shape", "axis", "teacher", "shape", "axis", "weight"]]
    for pair in pairs:
        cells: list[str] = []
        for name, trace, axis in ((pair.student, student, pair.axes[0]), (pair.teacher, teacher, pair.axes[1])):
            tensor = trace.tensor(name, pair.select)
            shown = tensor.neuron_axis if axis is None and tensor else axis
            cells += [f"{name} ({trace.layer(name).kind})", str(tensor.shape if tensor else "?"), str(shown)]
        rows.append([*cells, f"{pair.weight:.3g}"])
    left = {0, 3}
    if plans:
        left.add(len(rows[0]))
        for row, plan in zip(rows, ["plan", *plans], strict=True):
            row.append(plan)
    used = [tuple(found.used.source.described if found.used else "none" for found in sides) for sides in masks]
    if any(names != ("none", "none") for names in used):
        left.add(len(rows[0]))
        for row, names in zip(rows, [("mask", "mask"), *used], strict=True):
            row.append(names[0] if names[0] == names[1] else " / ".join(names))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
