"""What all figures share, those of examples and benchmarks too: colours, sizes, axes, names. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "BASELINE",
    "COST_COLOURS",
    "CURVE_COLOURS",
    "CURVE_LINES",
    "LONG_SIDE",
    "MAX_CELLS",
    "MAX_NUMBERED",
    "SHORT_SIDE",
    "add_colour_bar",
    "as_matrix",
    "draw_frames",
    "new_axes",
    "plain_axes",
    "plan_colours",
    "pyplot",
    "shorten",
    "tick_integers",
    "write_numbers",
]

#: Colours of Okabe and Ito, which people with any kind of colour vision can tell apart. Their yellow is left out: it
#: is hard to see on white.
CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
#: 4 line styles and 7 colours have no common factor, so 28 curves differ, also in print without colours.
CURVE_LINES = ("-", "--", "-.", ":")
#: What others are compared with.
BASELINE = "#999999"
#: A perceptually uniform colour map.
COST_COLOURS = "viridis"
#: Largest number of cells drawn along one side: a figure has too few pixels for more.
MAX_CELLS = 128
#: Largest number of layers along one side for which the numbers fit into the cells.
MAX_NUMBERED = 16
#: Shortest and longest side of a heat map, in inches.
SHORT_SIDE, LONG_SIDE = 3.0, 4.2
_DPI = 200
_NAME_LENGTH = 36


def pyplot() -> ModuleType:
    """``matplotlib.pyplot``, imported at the first figure: matplotlib is optional.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Figures need matplotlib: pip install matplotlib.") from error
    return pyplot


def new_axes(width: float, height: float) -> Axes:
    """The axes of a new figure of this size in inches."""
    _, ax = pyplot().subplots(figsize=(width, height), dpi=_DPI, layout="constrained")
    return cast("Axes", ax)


def plan_colours() -> Any:
    """The colour map of plans: most entries are 0, which is white; darker is more, with any colour vision."""
    pyplot()  # says what to install
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("plan", ["#FFFFFF", "#A6CEE9", CURVE_COLOURS[0], "#00263D"])


def plain_axes(ax: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """A light grid behind the data, and no lines above and at the right."""
    ax.grid(visible=True, axis=grid, color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def as_matrix(values: Any, name: str) -> Tensor:
    """Values to draw, on the CPU.

    Raises:
        ValueError: If they are no non-empty matrix.
    """
    matrix = torch.as_tensor(values).detach().to("cpu", torch.float32)
    if matrix.dim() != 2 or 0 in matrix.shape:
        batch = f" Draw one of a batch: {name}[0]." if matrix.dim() == 3 else ""
        raise ValueError(f"Expected argument `{name}` to be a non-empty matrix, but got {tuple(matrix.shape)}.{batch}")
    return matrix


def tick_integers(*axes: Axis) -> None:
    """Put ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def add_colour_bar(ax: Axes, image: Any, label: str) -> tuple[Figure, Axes]:
    """Add a colour bar that is as high as the image; returns the figure and the axes of the image."""
    figure = cast("Figure", ax.figure)
    # Inset axes follow the height of the image. A bar next to axes of fixed aspect would not.
    figure.colorbar(image, cax=ax.inset_axes((1.03, 0, 0.05, 1)), label=label)
    return figure, ax


def write_numbers(ax: Axes, image: Any, matrix: Tensor) -> None:
    """Write each finite value into its cell, in black or white, whichever can be read on the colour of the cell."""
    for row, values in enumerate(matrix.tolist()):
        for column, value in enumerate(values):
            if math.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                is_light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5
                colour = "black" if is_light else "white"
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def draw_frames(ax: Axes, cells: Iterable[tuple[int, int]], label: str) -> None:
    """Draw a frame around each cell ``(row, column)``, black on white so that it is seen on every colour."""
    from matplotlib.patches import Rectangle

    shape: dict[str, Any] = {"width": 0.88, "height": 0.88, "fill": False}
    for row, column in cells:
        for colour, width in (("white", 3.5), ("black", 1.5)):
            ax.add_patch(Rectangle((column - 0.44, row - 0.44), edgecolor=colour, linewidth=width, **shape))
    frame = Rectangle((0, 0), edgecolor="black", linewidth=1.5, label=label, **shape)
    ax.legend(handles=[frame], loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize="small")


def shorten(names: Sequence[str]) -> list[str]:
    """Long names with their middle replaced by "…"; all names in full where two would become the same.

    Example:
        >>> shorten(["backbone.encoder.layers.encoder_layer_11.mlp.3"])
        ['backbone.enc….encoder_layer_11.mlp.3']
    """
    head = _NAME_LENGTH // 3
    short = [
        name if len(name) <= _NAME_LENGTH else f"{name[:head]}…{name[head + 1 - _NAME_LENGTH :]}" for name in names
    ]
    return short if len(set(short)) == len(set(names)) else list(names)
