"""Curves: of a training, and the singular values of rotations. Needs matplotlib.

Each function returns the figure and its axes, as torchmetrics does. Showing, saving and closing the figure is up to the
caller. What is not set here (fonts, sizes) follows the user's settings; no global setting is changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lightning_otrt.analysis.plot_style import CURVE_COLOURS, CURVE_LINES, new_axes, plain_axes, tick_integers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_history", "plot_singular_values"]


def plot_history(
    history: Mapping[str, Sequence[float]],
    steps: Sequence[float] | None = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Training curves. Each has its own colour and line style.

    Args:
        history: Values by the name of the curve. NaN leaves a gap.
        steps: The step of each value. None numbers them from 0.
        title: Title of the figure, such as the layers and the step.
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
    plain_axes(ax)
    ax.set_title(title or "", fontsize="medium")
    # A long legend goes beside the curves, where it hides none of them.
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(history) > 4 else {"loc": "best"}
    # 3.0 shows a full period of each line style.
    ax.legend(frameon=False, fontsize="small", handlelength=3.0, **beside)
    return cast("Figure", ax.figure), ax


def plot_singular_values(
    values: Mapping[str, Tensor | None], *, title: str | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    r"""Singular values of the cross-correlations behind orthogonal couplings, in place of pictures of plans.

    The i-th value says how much both layers agree along their i-th common direction. A curve that falls at once means
    that they agree along a few directions only; a dotted line is that of layers that agree along all N, 1 / N.

    Args:
        values: For each curve its name and the singular values, such as ``result.singular_values`` of
            ``transport_distance(..., plan="orthogonal")``.
        title: Title of the figure, such as the layers and the step.
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
    figure, ax = plot_history(padded, range(1, longest + 1), title=title or "Singular values", ax=ax)
    for length in sorted(set(map(len, curves.values()))):
        ax.axhline(1 / length, color="0.6", linestyle=":", linewidth=1.0)
    ax.set_xlabel("direction")
    ax.set_ylabel("singular value")
    ax.set_ylim(bottom=0)
    return figure, ax
