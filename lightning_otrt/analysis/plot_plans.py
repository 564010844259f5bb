"""Pictures of transport plans and of the costs behind them. Needs matplotlib.

Each function returns the figure and its axes, as torchmetrics does. Showing, saving and closing the figure is up to the
caller. What is not set here (fonts, sizes) follows the user's settings; no global setting is changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_otrt.analysis.neuron_order import diagonal_mass, matched_order
from lightning_otrt.analysis.plot_style import (
    COST_COLOURS,
    LONG_SIDE,
    MAX_CELLS,
    SHORT_SIDE,
    add_colour_bar,
    as_matrix,
    new_axes,
    plan_colours,
    shorten,
    tick_integers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_cost", "plot_plan"]


def plot_plan(
    plan: Tensor,
    *,
    order: bool = True,
    student_label: str = "student neuron",
    teacher_label: str = "teacher neuron",
    title: str | None = None,
    distance: float | Tensor | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    r"""Heat map of a transport plan.

    Colours show :math:`P_{ij} \max(N, M)`: the share of a neuron's mass that goes to this partner. The neuron is that
    of the student for :math:`N \ge M`, else that of the teacher. A one-to-one matching shows as a line of ones, a plan
    that matches nothing as one even colour.

    Ordering by match brings mass to the diagonal whatever the plan. So the title says which share of the mass lies
    there, and which share does in a random order of the same neurons: the first alone says little.

    Args:
        plan: P, ``(N, M)``: rows are student neurons, columns teacher neurons.
        order: Reorder the wider side by the partner that takes most of each neuron's mass, so that matched neurons lie
            on the diagonal. The axis of that side then counts positions in the new order, not indices of neurons.
        student_label: Label of the rows, such as the name of the student's layer.
        teacher_label: Label of the columns.
        title: Title of the figure, such as the layers and the step.
        distance: The transport distance, for the title.
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
    found = [] if distance is None else [f"distance {float(distance):.3f}"]
    on_diagonal, by_chance = diagonal_mass(matrix)
    found.append(f"{on_diagonal:.0%} of the mass on the diagonal, in random order {by_chance:.0%}")
    return _heat_map(
        matrix * max(rows, columns),
        ax=ax,
        colours=plan_colours(),
        title=f"{title or 'Transport plan'}\n{', '.join(found)}",
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
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Heat map of the costs between neurons.

    Args:
        cost: M, ``(N, M)``: rows are student neurons, columns teacher neurons.
        plan: P, ``(N, M)``. The neurons are then ordered as in :func:`plot_plan`. None keeps their order.
        student_label: Label of the rows, such as the name of the student's layer.
        teacher_label: Label of the columns.
        title: Title of the figure, such as the layers and the step.
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
    matrix = as_matrix(cost, "cost")
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
    return _heat_map(
        matrix, ax=ax, colours=COST_COLOURS, title=title or "Costs between neurons", labels=labels, bar="cost"
    )


def _as_plan(plan: Any) -> Tensor:
    matrix = as_matrix(plan, "plan")
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
    colours: Any,
    title: str,
    labels: tuple[str, str],
    bar: str,
    lowest: float | None = None,
) -> tuple[Figure, Axes]:
    rows, columns = matrix.shape
    if ax is None:
        scale = LONG_SIDE / max(rows, columns)
        size = (max(scale * columns, SHORT_SIDE) + 2.3, max(scale * rows, SHORT_SIDE) + 1.2)
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
    ax.set_title(title, fontsize="medium")
    ax.set_ylabel(labels[0])
    ax.set_xlabel(labels[1])
    tick_integers(ax.xaxis, ax.yaxis)
    return add_colour_bar(ax, image, bar)
