"""How the figures of the documentation are drawn: once for light pages and once for dark ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["GREY", "IMAGES", "best_order", "correlations", "save"]

IMAGES = Path(__file__).parents[1] / "images"
#: Read on white and on black.
GREY = "#8b949e"
_INKS = {"light": "#1f2328", "dark": "#e6edf3"}


def save(name: str, draw: Callable[[], Figure]) -> None:
    """Draw a figure with dark ink on nothing and with light ink on nothing: ``NAME_light.svg`` and ``NAME_dark.svg``.

    Args:
        name: First part of the file names.
        draw: Makes the figure.
    """
    IMAGES.mkdir(exist_ok=True)
    for mode, ink in _INKS.items():
        keys = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "axes.edgecolor")
        style = {
            **dict.fromkeys(keys, ink),
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.labelsize": 9,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "font.size": 9,
            # The same file each time: no random names inside.
            "svg.hashsalt": name,
        }
        with plt.rc_context(style):
            figure = draw()
            path = IMAGES / f"{name}_{mode}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def correlations(student: Tensor, teacher: Tensor) -> Tensor:
    """The correlation of each student neuron with each teacher neuron.

    Args:
        student: Activations ``(N, n)`` of ``N`` neurons at ``n`` observations.
        teacher: Activations ``(M, n)`` at the same observations.

    Returns:
        Correlations ``(N, M)``; 0 for a neuron that is constant.
    """
    rows = []
    for neurons in (student, teacher):
        centred = neurons - neurons.mean(1, keepdim=True)
        rows.append(centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-9))
    return rows[0] @ rows[1].T


def best_order(values: Tensor) -> tuple[Tensor, float]:
    """The best one-to-one match on the diagonal, strongest pair first.

    Args:
        values: Correlations ``(N, M)``.

    Returns:
        The matched rows and columns, ``min(N, M)`` of each, and the mean correlation of the matched pairs.
    """
    rows, columns = (torch.as_tensor(side) for side in linear_sum_assignment(-values.numpy()))
    strongest = values[rows, columns].argsort(descending=True)
    ordered = values[rows[strongest]][:, columns[strongest]]
    return ordered, float(ordered.diagonal().mean())
