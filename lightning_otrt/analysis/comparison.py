"""The result of comparing all layers of a student with all layers of a teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_otrt.analysis.metric import NeuronTransportDistance
from lightning_otrt.analysis.plots import plot_distances
from lightning_otrt.layers.order import match_in_order
from lightning_otrt.transport.distance import TransportResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["RepresentationComparison"]


@dataclass(frozen=True, eq=False)
class RepresentationComparison:
    """The result of :func:`compare_representations`: distances between all layers of a student and all of a teacher.

    Attributes:
        distances: Transport distances ``(S, T)`` on the CPU; NaN where one layer gives a map and the other a sequence,
            or no plan was found.
        student_layers: Names of the S student layers, in the order in which their forwards end.
        teacher_layers: Names of the T teacher layers.
        samples: Number of samples seen.
        statistics: The metric behind each distance, by ``(student layer, teacher layer)``; none for layers that cannot
            be compared.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_otrt import compare_representations
        >>> net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> batches = [torch.randn(50, 6) for _ in range(4)]
        >>> result = compare_representations(net, net, batches, progress=False)
        >>> result.as_layers()  # each layer of a network is closest to itself
        {'1': '1', '3': '3'}
        >>> result.transport("1", "3").plan.shape
        torch.Size([8, 8])
    """

    distances: Tensor
    student_layers: tuple[str, ...]
    teacher_layers: tuple[str, ...]
    samples: int
    statistics: Mapping[tuple[str, str], NeuronTransportDistance] = field(repr=False)

    @property
    def pairing(self) -> tuple[tuple[str, str], ...]:
        """The pairs ``(student layer, teacher layer)`` of least total distance, in order, with each layer used once.

        Every layer of the side with fewer layers gets a partner, where one exists; see
        :func:`lightning_otrt.layers.order.match_in_order`.
        """
        return tuple((self.student_layers[i], self.teacher_layers[j]) for i, j in match_in_order(self.distances))

    @property
    def closest(self) -> dict[str, str]:
        """The closest teacher layer of each student layer, in any order. Layers without a distance are left out."""
        rows = zip(self.student_layers, self.distances.nan_to_num(nan=torch.inf), strict=True)
        return {name: self.teacher_layers[int(row.argmin())] for name, row in rows if bool((row < torch.inf).any())}

    @property
    def plans(self) -> dict[tuple[str, str], Tensor]:
        """The transport plans ``(N, M)`` of the pairs in :attr:`pairing`. They are solved at each access."""
        return {pair: self.transport(*pair).plan for pair in self.pairing}

    def transport(self, student_layer: str, teacher_layer: str) -> TransportResult:
        """Plan, cost and diagnostics of two layers, in float64. They are computed at each call, to save memory.

        Raises:
            KeyError: If a layer was not compared.
            ValueError: If the two layers cannot be compared.
        """
        for side, name, names in (
            ("student", student_layer, self.student_layers),
            ("teacher", teacher_layer, self.teacher_layers),
        ):
            if name not in names:
                raise KeyError(f"{name!r} is none of the {side} layers that were compared: {list(names)}.")
        if (student_layer, teacher_layer) not in self.statistics:
            raise ValueError(
                f"The student layer {student_layer!r} and the teacher layer {teacher_layer!r} cannot be compared: one "
                "gives a map and the other a sequence."
            )
        # A metric keeps its last plan. The plan of a copy is freed with the copy.
        return copy.deepcopy(self.statistics[student_layer, teacher_layer]).transport()

    def as_layers(self) -> dict[str, str]:
        """:attr:`pairing` in the form that ``layers=`` takes."""
        return dict(self.pairing)

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Heat map of the distances, with frames around :attr:`pairing`.

        Args:
            ax: Axes to draw on. None makes a figure.

        Returns:
            The figure and its axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return plot_distances(self.distances, self.student_layers, self.teacher_layers, pairing=self.pairing, ax=ax)

    def to_dataframe(self) -> Any:
        """The distances as a ``pandas.DataFrame`` with layer names.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "`to_dataframe` needs pandas: pip install pandas. Without it, use the tensor `distances`; its rows are "
                "`student_layers` and its columns `teacher_layers`."
            ) from error
        frame = DataFrame(self.distances.numpy(), index=self.student_layers, columns=self.teacher_layers)
        return frame.rename_axis(index="student", columns="teacher")
