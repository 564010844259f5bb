"""Figures: transport plans and costs, singular values, distances between layers, training curves. Needs matplotlib.

Each function returns the figure and its axes, as torchmetrics does. Showing, saving and closing the figure is up to
the caller. What is not set here (fonts, sizes) follows the user's settings; no global setting is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_otrt.analysis.neuron_order import matched_order
from lightning_otrt.analysis.plot_style import (
    COST_COLOURS,
    CURVE_COLOURS,
    CURVE_LINES,
    LONG_SIDE,
    MAX_CELLS,
    MAX_NUMBERED,
    PLAN_COLOURS,
    SHORT_SIDE,
    add_colour_bar,
    draw_frames,
    new_axes,
    shorten,
    tick_integers,
    write_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_cost", "plot_distances", "plot_history", "plot_plan", "plot_singular_values"]


def plot_plan(
    plan: Tensor,
    *,
    order: bool = True,
    student_label: str = "student neuron",
    teacher_label: str = "teacher neuron",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    r"""Heat map of a transport plan.

    Colours show :math:`P_{ij} \max(N, M)`: the share of a neuron's mass that goes to this partner. The neuron is that
    of the student for :math:`N \ge M`, else that of the teacher. A one-to-one matching shows as a line of ones, a plan
    that matches nothing as one even colour.

    Args:
        plan: P, ``(N, M)``: rows are student neurons, columns teacher neurons.
        order: Reorder the wider side by the partner that takes most of each neuron's mass, so that matched neurons lie
            on the diagonal. The axis of that side then counts positions in the new order, not indices of neurons.
        student_label: Label of the rows, such as the name of the student's layer.
        teacher_label: Label of the columns.
        ax: Axes to draw on. None makes a figure.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If the plan is not a non-empty matrix, or has negative entries, as that of a rotation has.
        ModuleNotFoundError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> from lightning_otrt import plot_plan
        >>> figure, axes = plot_plan(torch.eye(32)[torch.randperm(32)] / 32, student_label="layer4")
        >>> axes.get_ylabel()
        'layer4'
    """
    matrix = _as_plan(plan)
    rows, columns = matrix.shape
    side = "student" if rows >= columns else "teacher"
    if order:
        row_order, column_order = matched_order(matrix)
        matrix = matrix[row_order][:, column_order]
    return _heat_map(
        matrix * max(rows, columns),
        ax=ax,
        colours=PLAN_COLOURS,
        labels=_neuron_labels(student_label, teacher_label, matrix, ordered=order),
        bar=f"share of the {side} neuron's mass",
        lowest=0.0,
    )


def plot_cost(
    cost: Tensor,
    *,
    plan: Tensor | None = None,
    student_label: str = "student neuron",
    teacher_label: str = "teacher neuron",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Heat map of the costs between neurons.

    Args:
        cost: M, ``(N, M)``: rows are student neurons, columns teacher neurons.
        plan: P, ``(N, M)``. The neurons are then ordered as in :func:`plot_plan`. None keeps their order.
        student_label: Label of the rows, such as the name of the student's layer.
        teacher_label: Label of the columns.
        ax: Axes to draw on. None makes a figure.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If the cost is not a non-empty matrix or the plan has another shape.
        ModuleNotFoundError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> from lightning_otrt import plot_cost, transport_distance
        >>> result = transport_distance(torch.randn(16, 200), torch.randn(24, 200))
        >>> figure, axes = plot_cost(result.cost, plan=result.plan)
    """
    matrix = _as_matrix(cost, "cost")
    if plan is not None:
        coupling = _as_plan(plan)
        if coupling.shape != matrix.shape:
            raise ValueError(
                f"Expected arguments `cost` {tuple(matrix.shape)} and `plan` {tuple(coupling.shape)} to have the "
                "same shape."
            )
        row_order, column_order = matched_order(coupling)
        matrix = matrix[row_order][:, column_order]
    labels = _neuron_labels(student_label, teacher_label, matrix, ordered=plan is not None)
    return _heat_map(matrix, ax=ax, colours=COST_COLOURS, labels=labels, bar="cost")


def plot_singular_values(values: Mapping[str, Tensor | None], *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    r"""Singular values of the cross-correlations behind orthogonal couplings, in place of pictures of plans.

    The i-th value says how much both layers agree along their i-th common direction. A curve that falls at once means
    that they agree along a few directions only; the dotted line is that of N = M neurons that agree along all, 1 / N.

    Args:
        values: For each curve its name and the singular values, such as ``result.singular_values`` of
            ``transport_distance(..., plan="orthogonal")``.
        ax: Axes to draw on. None makes a figure.

    Returns:
        The figure and its axes.

    Raises:
        TypeError: If the argument is no mapping.
        ValueError: If there is no curve, or values are not a vector.
        ModuleNotFoundError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> from lightning_otrt import plot_singular_values, transport_distance
        >>> result = transport_distance(torch.randn(16, 200), torch.randn(24, 200), plan="orthogonal")
        >>> figure, axes = plot_singular_values({"layer4": result.singular_values})
        >>> axes.get_xlabel()
        'direction'
    """
    if not isinstance(values, Mapping):
        raise TypeError(
            "Expected argument `values` to be a mapping from the name of a curve to its singular values, but got a "
            f"{type(values).__name__}. Give it a name: plot_singular_values({{'layer4': values}})."
        )
    if not values:
        raise ValueError("Expected argument `values` to contain at least one curve, but it is empty.")
    curves = {}
    for name, given in values.items():
        if given is None:
            raise ValueError(
                f"The singular values {name!r} are None, as those of a transport plan are. Pass those of a distance "
                'with plan="orthogonal", or draw the plan with `plot_plan`.'
            )
        curves[name] = torch.as_tensor(given).detach().float().cpu()
        if curves[name].dim() != 1 or not len(curves[name]):
            shape = tuple(curves[name].shape)
            raise ValueError(f"Expected the singular values {name!r} to be a non-empty vector, but got {shape}.")
    longest = max(map(len, curves.values()))
    padded = {name: each.tolist() + [math.nan] * (longest - len(each)) for name, each in curves.items()}
    figure, ax = plot_history(padded, range(1, longest + 1), ax=ax)
    ax.axhline(1 / longest, color="0.6", linestyle=":", linewidth=1.0)
    ax.set_xlabel("direction")
    ax.set_ylabel("singular value")
    ax.set_ylim(bottom=0)
    return figure, ax


def plot_distances(
    distances: Tensor,
    student_layers: Sequence[str],
    teacher_layers: Sequence[str],
    *,
    pairing: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
    label: str = "transport distance",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Heat map of the distances between all layers of a student and all layers of a teacher.

    Args:
        distances: ``(S, T)``, NaN where two layers cannot be compared.
        student_layers: Names of the S rows.
        teacher_layers: Names of the T columns.
        pairing: Pairs ``student layer -> teacher layer`` to draw a frame around.
        label: What the values are, beside the bar of colours.
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
    matrix = _as_matrix(distances, "distances")
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
    if pairs:
        draw_frames(ax, pairs, "paired")
    return add_colour_bar(ax, image, label)


def plot_history(
    history: Mapping[str, Sequence[float]],
    steps: Sequence[float] | None = None,
    *,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Training curves. Each has its own colour and line style.

    Args:
        history: Values by the name of the curve. NaN leaves a gap.
        steps: The step of each value. None numbers them from 0.
        ax: Axes to draw on. None makes a figure.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If there is no curve, or the length of a curve differs from that of ``steps``.
        ModuleNotFoundError: If matplotlib is not installed.

    Example:
        >>> from lightning_otrt import plot_history
        >>> curves = {"train/loss": [2.3, 1.9, 1.4], "train/otrt": [0.61, 0.44, 0.37]}
        >>> figure, axes = plot_history(curves, steps=[0, 50, 100])
        >>> axes.get_xlabel()
        'step'
    """
    if not history:
        raise ValueError("Expected argument `history` to contain at least one curve, but it is empty.")
    for name, values in history.items():
        if steps is not None and len(values) != len(steps):
            raise ValueError(
                f"Expected curve {name!r} of argument `history` to have {len(steps)} values, one for each of `steps`, "
                f"but got {len(values)}."
            )
    if ax is None:
        ax = new_axes(6.0, 3.6)
    for (name, values), colour, line in zip(history.items(), cycle(CURVE_COLOURS), cycle(CURVE_LINES), strict=False):
        marker = "o" if len(values) == 1 else None
        ax.plot(range(len(values)) if steps is None else steps, values, line, color=colour, marker=marker, label=name)
    ax.set_xlabel("step")
    tick_integers(ax.xaxis)
    ax.grid(visible=True, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    # A long legend goes beside the curves, where it hides none of them.
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(history) > 4 else {"loc": "best"}
    # 3.0 shows a full period of each line style.
    ax.legend(frameon=False, fontsize="small", handlelength=3.0, **beside)
    return cast("Figure", ax.figure), ax


def _as_matrix(values: Any, name: str) -> Tensor:
    matrix = torch.as_tensor(values).detach().to("cpu", torch.float32)
    if matrix.dim() != 2 or 0 in matrix.shape:
        batch = f" Draw one of a batch: {name}[0]." if matrix.dim() == 3 else ""
        raise ValueError(f"Expected argument `{name}` to be a non-empty matrix, but got {tuple(matrix.shape)}.{batch}")
    return matrix


def _as_plan(plan: Any) -> Tensor:
    matrix = _as_matrix(plan, "plan")
    # Rounding may leave a plan that a user computed a little below 0.
    if bool(matrix.min() < -1e-6 * matrix.abs().max()):
        raise ValueError(
            f"A transport plan has no negative entries, but this one goes down to {float(matrix.min()):.3g}. That of "
            'plan="orthogonal" is a rotation and moves no mass: draw its singular values with `plot_singular_values`.'
        )
    return matrix


def _neuron_labels(student: str, teacher: str, matrix: Tensor, *, ordered: bool) -> tuple[str, str]:
    student, teacher = (shorten([label])[0] for label in (student, teacher))
    if ordered and matrix.shape[1] >= matrix.shape[0]:
        teacher += "\n(ordered by match)"
    elif ordered:
        student += "\n(ordered by match)"
    return student, teacher


def _heat_map(
    matrix: Tensor,
    *,
    ax: Axes | None,
    colours: str,
    labels: tuple[str, str],
    bar: str,
    lowest: float | None = None,
) -> tuple[Figure, Axes]:
    rows, columns = matrix.shape
    if ax is None:
        scale = LONG_SIDE / max(rows, columns)
        size = (max(scale * columns, SHORT_SIDE) + 1.9, max(scale * rows, SHORT_SIDE) + 0.7)
        ax = new_axes(*size)
    stride = -(-max(rows, columns) // MAX_CELLS)
    if stride > 1:
        # There are more entries than pixels. Shown is the largest of each block: its mean would hide single entries.
        matrix = torch.nn.functional.max_pool2d(matrix[None, None], stride, ceil_mode=True)[0, 0]
        bar += f" (largest of {stride} × {stride})"
    image = ax.imshow(
        matrix.numpy(),
        cmap=colours,
        vmin=lowest,
        interpolation="nearest",
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
        # With very different widths, square cells would make the map a thin strip.
        aspect="equal" if max(rows, columns) * SHORT_SIDE <= min(rows, columns) * LONG_SIDE else "auto",
    )
    ax.set_ylabel(labels[0])
    ax.set_xlabel(labels[1])
    tick_integers(ax.xaxis, ax.yaxis)
    return add_colour_bar(ax, image, bar)


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
