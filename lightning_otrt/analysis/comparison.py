"""The result of comparing all layers of a student with all layers of a teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_otrt.analysis.comparison_table import format_table
from lightning_otrt.analysis.metric import NeuronTransportDistance
from lightning_otrt.analysis.plot_layers import plot_distances
from lightning_otrt.layers.grammar import written
from lightning_otrt.layers.order import match_in_order
from lightning_otrt.reading.chance import relative_to_chance
from lightning_otrt.transport.distance import TransportResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["RepresentationComparison"]

#: The values that can be plotted or exported, with their labels in a figure.
Values: TypeAlias = Literal["relative", "distances", "chance"]
_LABELS = {
    "relative": "transport distance / that by chance",
    "distances": "transport distance",
    "chance": "transport distance by chance",
}


@dataclass(frozen=True, eq=False, repr=False)
class RepresentationComparison:
    """The result of :func:`compare_representations`: distances between all layers of a student and all of a teacher.

    Attributes:
        distances: Transport distances ``(S, T)`` on the CPU; NaN where one layer gives a map and the other a sequence,
            or no plan was found.
        chance: Distances ``(S, T)`` to the same teacher layers with other samples. They differ from layer to layer, and
            so the distances alone do not say which layer is closest.
        pooled: Booleans ``(S, T)``: whether one layer has positions and the other none. The former is then averaged
            over its positions, which makes it another representation. Such pairs come last in pairing and closest
            layers.
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
        >>> bool((result.relative.diagonal() < result.relative[0, 1]).all())
        True
        >>> result  # `print(result)` shows the table of distances
        RepresentationComparison(2 student layers, 2 teacher layers, 200 samples)
    """

    distances: Tensor
    chance: Tensor
    pooled: Tensor
    student_layers: tuple[str, ...]
    teacher_layers: tuple[str, ...]
    samples: int
    statistics: Mapping[tuple[str, str], NeuronTransportDistance] = field(repr=False)

    @property
    def relative(self) -> Tensor:
        """:attr:`distances` over :attr:`chance`, ``(S, T)``: 0 for the same layer, 1 for layers that share nothing.

        Where both are zero, as for layers that do not depend on the sample, it is 1. Pairing and closest layers use it.
        """
        return relative_to_chance(self.distances, self.chance)

    @property
    def pairing(self) -> tuple[tuple[str, str], ...]:
        """The pairs ``(student layer, teacher layer)`` of least total :attr:`relative` distance, in order.

        Each layer is used once, and :attr:`pooled` pairs come last. Every layer of the side with fewer layers gets a
        partner, where one exists.
        """
        return tuple((self.student_layers[i], self.teacher_layers[j]) for i, j in match_in_order(self._ranked))

    @property
    def closest(self) -> dict[str, str]:
        """The teacher layer of least :attr:`relative` distance for each student layer, in any order.

        A :attr:`pooled` one is taken only if there is no other. Layers without a distance are left out.
        """
        rows = zip(self.student_layers, self._ranked.nan_to_num(nan=torch.inf), strict=True)
        return {name: self.teacher_layers[int(row.argmin())] for name, row in rows if bool((row < torch.inf).any())}

    @property
    def _ranked(self) -> Tensor:
        """Relative distances, with those of pooled pairs above all others."""
        highest = self.relative.nan_to_num(nan=0.0).max() + 1
        return self.relative + self.pooled * highest

    def plans(self) -> dict[tuple[str, str], Tensor]:
        """The plans (or rotations) ``(N, M)`` of the pairs in :attr:`pairing`. They are solved at each call."""
        return {pair: self.transport(*pair).matrix for pair in self.pairing}

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
        return {written(student): written(teacher) for student, teacher in self.pairing}

    def __str__(self) -> str:
        """A table of the :attr:`relative` distances, with the closest teacher layer of each student layer marked.

        It is at most 120 characters wide and 40 lines long: layers in the middle are left out where it would be more.
        """
        title = f"Transport distance over that by chance, {self.samples} samples; * is the closest teacher layer"
        return f"{title}\n{format_table(self.relative, self.student_layers, self.teacher_layers, self.closest)}"

    def __repr__(self) -> str:
        """How much was compared."""
        counts = f"{len(self.student_layers)} student layers, {len(self.teacher_layers)} teacher layers"
        return f"{type(self).__name__}({counts}, {self.samples} samples)"

    def plot(self, ax: Axes | None = None, *, values: Values = "relative") -> tuple[Figure, Axes]:
        """Heat map of the distances, with frames around :attr:`pairing`.

        Args:
            ax: Axes to draw on. None makes a figure.
            values: ``"relative"`` to chance, by which layers are paired, ``"distances"`` or ``"chance"``.

        Returns:
            The figure and its axes.

        Raises:
            ValueError: If ``values`` is none of these.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        matrix, label = self._values(values)
        return plot_distances(
            matrix,
            self.student_layers,
            self.teacher_layers,
            pairing=self.pairing,
            label=label,
            title=f"{self.samples} samples",
            ax=ax,
        )

    def to_dataframe(self, values: Values = "relative") -> Any:
        """The distances as a ``pandas.DataFrame`` with layer names.

        Args:
            values: As in :meth:`plot`.

        Raises:
            ValueError: If ``values`` is none of these.
            ModuleNotFoundError: If pandas is not installed.
        """
        matrix, _ = self._values(values)
        try:
            from pandas import DataFrame
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "`to_dataframe` needs pandas: pip install pandas. Without it, use the tensors `distances`, `chance` "
                "and `relative`; their rows are `student_layers` and their columns `teacher_layers`."
            ) from error
        frame = DataFrame(matrix.numpy(), index=self.student_layers, columns=self.teacher_layers)
        return frame.rename_axis(index="student", columns="teacher")

    def _values(self, values: str) -> tuple[Tensor, str]:
        if values not in _LABELS:
            raise ValueError(f"Expected argument `values` to be one of {list(_LABELS)}, but got {values!r}.")
        matrix: Tensor = getattr(self, values)
        return matrix, _LABELS[values]
