"""Figures: transport plans and costs, distances between layers, training curves. Needs matplotlib.

Each function returns the figure and its axes, as torchmetrics does, and leaves showing, saving and closing to the
caller. Fonts and sizes that are not set here are the user's own; nothing global is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["plot_cost", "plot_distances", "plot_history", "plot_plan"]

#: Okabe and Ito's colours, told apart with every kind of colour vision; without yellow, which is lost on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
#: As many line styles as make each of 28 curves different in print without colours, since 4 and 7 share no factor.
_LINES = ("-", "--", "-.", ":")
#: Perceptually uniform maps; plans are mostly empty, which is best left light on paper.
_PLAN_COLOURS, _COST_COLOURS = "magma_r", "viridis"
_DPI = 200
#: Cells along one side above which a figure has fewer dots than the matrix has entries.
_CELLS = 512
#: Layers along one side above which numbers no longer fit into the cells.
_NUMBERED = 16
_NAME_LENGTH = 36
#: Side of an axes in inches: enough for the label of a colour bar, little enough for a page.
_SHORT, _LONG = 3.0, 4.2


def plot_plan(
    plan: Tensor,
    *,
    order: bool = True,
    student_label: str = "student neuron",
    teacher_label: str = "teacher neuron",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    r"""Heat map of a transport plan.

    Colours show :math:`P_{ij} \max(N, M)`: the share of a neuron's mass, of the student for :math:`N \ge M` and of the
    teacher otherwise, that this pair carries. A clean matching is a line of ones; a plan that matches nothing is even.

    Args:
        plan: P, ``(N, M)``: rows are student neurons, columns teacher neurons.
        order: Order the wider side by the partner that takes most of each neuron's mass, so that matched neurons lie on
            the diagonal. Ranks then take the place of the indices of that side.
        student_label: Label of the rows, such as the name of the student's layer.
        teacher_label: Label of the columns.
        ax: Axes to draw on. None makes a figure.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If the plan is not a non-empty matrix.
        ModuleNotFoundError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> from lightning_otrt.analysis.plots import plot_plan
        >>> figure, axes = plot_plan(torch.eye(32)[torch.randperm(32)] / 32, student_label="layer4")
        >>> axes.get_ylabel()
        'layer4'
    """
    matrix = _as_matrix(plan, "plan")
    rows, columns = matrix.shape
    side = "student" if rows >= columns else "teacher"
    if order:
        row_order, column_order = _matched_order(matrix)
        matrix = matrix[row_order][:, column_order]
    return _heat_map(
        matrix * max(rows, columns),
        ax=ax,
        colours=_PLAN_COLOURS,
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
        plan: ``(N, M)``; orders the neurons as :func:`plot_plan` does. None keeps their order.
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
        >>> from lightning_otrt import transport_distance
        >>> from lightning_otrt.analysis.plots import plot_cost
        >>> result = transport_distance(torch.randn(16, 200), torch.randn(24, 200))
        >>> figure, axes = plot_cost(result.cost, plan=result.plan)
    """
    matrix = _as_matrix(cost, "cost")
    if plan is not None:
        coupling = _as_matrix(plan, "plan")
        if coupling.shape != matrix.shape:
            raise ValueError(
                f"Expected arguments `cost` {tuple(matrix.shape)} and `plan` {tuple(coupling.shape)} to have one shape."
            )
        row_order, column_order = _matched_order(coupling)
        matrix = matrix[row_order][:, column_order]
    labels = _neuron_labels(student_label, teacher_label, matrix, ordered=plan is not None)
    return _heat_map(matrix, ax=ax, colours=_COST_COLOURS, labels=labels, bar="cost")


def plot_distances(
    distances: Tensor,
    student_layers: Sequence[str],
    teacher_layers: Sequence[str],
    *,
    pairing: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Heat map of the distances between all layers of a student and all layers of a teacher.

    Args:
        distances: ``(S, T)``, NaN where two layers cannot be compared.
        student_layers: Names of the S rows.
        teacher_layers: Names of the T columns.
        pairing: Pairs ``student layer -> teacher layer``, marked by frames.
        ax: Axes to draw on. None makes a figure that is large enough for the names.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If shapes do not fit or the pairing names an unknown layer.
        ModuleNotFoundError: If matplotlib is not installed.

    Example:
        >>> import torch
        >>> from lightning_otrt.analysis.plots import plot_distances
        >>> layers = ["layer1", "layer2", "layer3"]
        >>> figure, axes = plot_distances(torch.rand(3, 3), layers, layers, pairing={"layer3": "layer2"})
    """
    pyplot = _pyplot()
    matrix = _as_matrix(distances, "distances")
    rows, columns = matrix.shape
    if (rows, columns) != (len(student_layers), len(teacher_layers)):
        raise ValueError(
            f"Expected argument `distances` to have the shape ({len(student_layers)}, {len(teacher_layers)}) of the "
            f"student's and the teacher's layers, but got {(rows, columns)}."
        )
    pairs = _pair_indices(pairing, student_layers, teacher_layers)
    names = [_shorten(student_layers), _shorten(teacher_layers)]
    if ax is None:
        cell = 0.25 if max(rows, columns) > _NUMBERED else min(max(_SHORT / min(rows, columns), 0.5), 0.8)
        margins = [0.07 * max(map(len, side)) for side in names]
        size = (1.08 * cell * columns + margins[0] + 1.5, max(cell * rows, _SHORT / 2) + margins[1] + 0.8)
        _, ax = pyplot.subplots(figsize=size, dpi=_DPI, layout="constrained")
    image = ax.imshow(matrix.numpy(), cmap=_COST_COLOURS, interpolation="nearest")
    # A distance that does not exist must not look like a small one.
    ax.set_facecolor("0.85")
    ax.set_xticks(range(columns), names[1], rotation=90, fontsize="small")
    ax.set_yticks(range(rows), names[0], fontsize="small")
    ax.tick_params(length=0)
    ax.set_xlabel("teacher layer")
    ax.set_ylabel("student layer")
    if max(rows, columns) <= _NUMBERED:
        _write_numbers(ax, image, matrix)
    if pairs:
        _frame(ax, pairs)
    return _with_bar(ax, image, "transport distance")


def plot_history(
    history: Mapping[str, Sequence[float]],
    steps: Sequence[float] | None = None,
    *,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Training curves, told apart by colour and by line.

    Args:
        history: Values by the name of the curve. NaN leaves a gap.
        steps: The step of each value. None numbers them from 0.
        ax: Axes to draw on. None makes a figure.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If there is no curve, or a curve has not as many values as there are steps.
        ModuleNotFoundError: If matplotlib is not installed.

    Example:
        >>> from lightning_otrt.analysis.plots import plot_history
        >>> curves = {"train/loss": [2.3, 1.9, 1.4], "train/otrt": [0.61, 0.44, 0.37]}
        >>> figure, axes = plot_history(curves, steps=[0, 50, 100])
        >>> axes.get_xlabel()
        'step'
    """
    pyplot = _pyplot()
    if not history:
        raise ValueError("Expected argument `history` to hold at least one curve, but it is empty.")
    for name, values in history.items():
        if steps is not None and len(values) != len(steps):
            raise ValueError(
                f"Expected curve {name!r} of argument `history` to have {len(steps)} values, one for each of `steps`, "
                f"but got {len(values)}."
            )
    if ax is None:
        _, ax = pyplot.subplots(figsize=(6.0, 3.6), dpi=_DPI, layout="constrained")
    for (name, values), colour, line in zip(history.items(), cycle(_COLOURS), cycle(_LINES), strict=False):
        marker = "o" if len(values) == 1 else None
        ax.plot(range(len(values)) if steps is None else steps, values, line, color=colour, marker=marker, label=name)
    ax.set_xlabel("step")
    _tick_integers(ax.xaxis)
    ax.grid(visible=True, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    # Beside the curves a long legend hides nothing; `handlelength` shows a whole period of each dash.
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(history) > 4 else {"loc": "best"}
    ax.legend(frameon=False, fontsize="small", handlelength=3.0, **beside)
    return cast("Figure", ax.figure), ax


def _pyplot() -> ModuleType:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Figures need matplotlib: pip install matplotlib.") from error
    return pyplot


def _as_matrix(values: Any, name: str) -> Tensor:
    matrix = torch.as_tensor(values).detach().to("cpu", torch.float32)
    if matrix.dim() != 2 or 0 in matrix.shape:
        batch = f" Draw one of a batch: {name}[0]." if matrix.dim() == 3 else ""
        raise ValueError(f"Expected argument `{name}` to be a non-empty matrix, but got {tuple(matrix.shape)}.{batch}")
    return matrix


def _matched_order(plan: Tensor) -> tuple[Tensor, Tensor]:
    """Orders of rows and columns that bring the large entries of a plan to the diagonal.

    Only the wider side moves: the other one keeps the indices that its network gives it.
    """
    rows, columns = plan.shape
    if columns >= rows:
        return torch.arange(rows), _by_partner(plan.T)
    return _by_partner(plan), torch.arange(columns)


def _by_partner(shares: Tensor) -> Tensor:
    """Order of the rows by the column of their largest entry, those of one column by the mean of their columns."""
    partner = shares.argmax(1)
    mean = shares @ torch.arange(shares.shape[1], dtype=shares.dtype) / shares.sum(1)
    order = mean.argsort(stable=True)
    return order[partner[order].argsort(stable=True)]


def _neuron_labels(student: str, teacher: str, matrix: Tensor, *, ordered: bool) -> tuple[str, str]:
    student, teacher = (_shorten([label])[0] for label in (student, teacher))
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
    pyplot = _pyplot()
    if ax is None:
        scale = _LONG / max(rows, columns)
        size = (max(scale * columns, _SHORT) + 1.9, max(scale * rows, _SHORT) + 0.7)
        _, ax = pyplot.subplots(figsize=size, dpi=_DPI, layout="constrained")
    stride = -(-max(rows, columns) // _CELLS)
    if stride > 1:
        # A figure has too few dots for every entry. Averaging would fade single entries out, so the largest is shown.
        matrix = torch.nn.functional.max_pool2d(matrix[None, None], stride, ceil_mode=True)[0, 0]
        bar += f" (largest of {stride} × {stride})"
    image = ax.imshow(
        matrix.numpy(),
        cmap=colours,
        vmin=lowest,
        interpolation="nearest",
        extent=(-0.5, columns - 0.5, rows - 0.5, -0.5),
        # Square cells would leave a thin strip of a layer and one many times as wide.
        aspect="equal" if max(rows, columns) * _SHORT <= min(rows, columns) * _LONG else "auto",
    )
    ax.set_ylabel(labels[0])
    ax.set_xlabel(labels[1])
    _tick_integers(ax.xaxis, ax.yaxis)
    return _with_bar(ax, image, bar)


def _tick_integers(*axes: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def _with_bar(ax: Axes, image: Any, label: str) -> tuple[Figure, Axes]:
    figure = cast("Figure", ax.figure)
    # Within the axes' own coordinates the bar is as high as the map, which a bar beside axes of fixed aspect is not.
    figure.colorbar(image, cax=ax.inset_axes((1.03, 0, 0.05, 1)), label=label)
    return figure, ax


def _write_numbers(ax: Axes, image: Any, matrix: Tensor) -> None:
    for row, values in enumerate(matrix.tolist()):
        for column, value in enumerate(values):
            if math.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5
                colour = "black" if light else "white"
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def _frame(ax: Axes, pairs: Iterable[tuple[int, int]]) -> None:
    """Frame cells, dark on light so that the frame is seen on every colour."""
    from matplotlib.patches import Rectangle

    shape: dict[str, Any] = {"width": 0.88, "height": 0.88, "fill": False}
    for row, column in pairs:
        for colour, width in (("white", 3.5), ("black", 1.5)):
            ax.add_patch(Rectangle((column - 0.44, row - 0.44), edgecolor=colour, linewidth=width, **shape))
    frame = Rectangle((0, 0), edgecolor="black", linewidth=1.5, label="paired", **shape)
    ax.legend(handles=[frame], loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize="small")


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


def _shorten(names: Sequence[str]) -> list[str]:
    """Names with their middle left out where they are long, unless they could no longer be told apart."""
    head = _NAME_LENGTH // 3
    short = [
        name if len(name) <= _NAME_LENGTH else f"{name[:head]}…{name[head + 1 - _NAME_LENGTH :]}" for name in names
    ]
    return short if len(set(short)) == len(set(names)) else list(names)
