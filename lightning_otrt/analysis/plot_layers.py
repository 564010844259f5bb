"""Pictures of the distances between all layers of two networks. Needs matplotlib.

Each function returns the figure and its axes, as torchmetrics does. Showing, saving and closing the figure is up to the
caller. What is not set here (fonts, sizes) follows the user's settings; no global setting is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_otrt.analysis.plot_style import (
    COST_COLOURS,
    MAX_NUMBERED,
    SHORT_SIDE,
    add_colour_bar,
    as_matrix,
    draw_frames,
    new_axes,
    shorten,
    write_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_distances"]


def plot_distances(
    distances: Tensor,
    student_layers: Sequence[str],
    teacher_layers: Sequence[str],
    *,
    pairing: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
    label: str = "transport distance",
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Heat map of the distances between all layers of a student and all layers of a teacher.

    Args:
        distances: ``(S, T)``, NaN where two layers cannot be compared.
        student_layers: Names of the S rows.
        teacher_layers: Names of the T columns.
        pairing: Pairs ``student layer -> teacher layer`` to draw a frame around.
        label: What the values are, beside the bar of colours.
        title: Title of the figure, such as the layers and the step.
        ax: Axes to draw on. None makes a figure that is large enough for the names.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If shapes do not fit or the pairing names an unknown layer.
        ModuleNotFoundError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> from lightning_otrt import plot_distances
        >>> layers = ["layer1", "layer2", "layer3"]
        >>> figure, axes = plot_distances(torch.rand(3, 3), layers, layers, pairing={"layer3": "layer2"})
    """
    matrix = as_matrix(distances, "distances")
    rows, columns = matrix.shape
    if (rows, columns) != (len(student_layers), len(teacher_layers)):
        raise ValueError(
            f"Expected argument `distances` to have the shape ({len(student_layers)}, {len(teacher_layers)}) of the "
            f"student's and the teacher's layers, but got {(rows, columns)}."
        )
    pairs = _pair_indices(pairing, student_layers, teacher_layers)
    names = [shorten(student_layers), shorten(teacher_layers)]
    if ax is None:
        cell = 0.25 if max(rows, columns) > MAX_NUMBERED else min(max(SHORT_SIDE / min(rows, columns), 0.5), 0.8)
        margins = [0.07 * max(map(len, side)) for side in names]
        size = (1.08 * cell * columns + margins[0] + 1.5, max(cell * rows, SHORT_SIDE / 2) + margins[1] + 0.8)
        ax = new_axes(*size)
    image = ax.imshow(matrix.numpy(), cmap=COST_COLOURS, interpolation="nearest")
    # Grey for NaN: the white background would look like a value of the colour map.
    ax.set_facecolor("0.85")
    ax.set_xticks(range(columns), names[1], rotation=90, fontsize="small")
    ax.set_yticks(range(rows), names[0], fontsize="small")
    ax.tick_params(length=0)
    ax.set_xlabel("teacher layer")
    ax.set_ylabel("student layer")
    if max(rows, columns) <= MAX_NUMBERED:
        write_numbers(ax, image, matrix)
    # Beside what the frames are.
    ax.set_title(title or "", loc="right", fontsize="medium")
    if pairs:
        draw_frames(ax, pairs, "paired")
    return add_colour_bar(ax, image, label)


def _pair_indices(
    pairing: Mapping[str, str] | Iterable[tuple[str, str]] | None, students: Sequence[str], teachers: Sequence[str]
) -> list[tuple[int, int]]:
    pairs = pairing.items() if isinstance(pairing, Mapping) else pairing or ()
    indices = []
    for student, teacher in pairs:
        for side, name, layers in (("student", student, students), ("teacher", teacher, teachers)):
            if name not in layers:
                raise ValueError(
                    f"Argument `pairing` names the {side} layer {name!r}, which is none of {list(islice(layers, 20))}."
                )
        indices.append((students.index(student), teachers.index(teacher)))
    return indices
