"""All layers of a student against all layers of a teacher, over a data set."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from lightning_otrt.analysis.metric import NeuronTransportDistance
from lightning_otrt.analysis.plots import plot_distances
from lightning_otrt.checks import check_count, check_module
from lightning_otrt.layers.comparable import LayerChoice, choose_layers
from lightning_otrt.layers.order import match_in_order
from lightning_otrt.reading.evaluation import in_evaluation
from lightning_otrt.reading.observer import Observer
from lightning_otrt.reading.positions import can_be_compared, match_positions
from lightning_otrt.reading.tracer import trace
from lightning_otrt.teacher.frozen import Teacher
from lightning_otrt.teacher.load import TeacherSource, load_teacher
from lightning_otrt.transport.distance import TransportResult
from lightning_otrt.transport.tensor_checks import check_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["RepresentationComparison", "batch_inputs", "compare_representations"]

Inputs: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class RepresentationComparison:
    """What :func:`compare_representations` gives: distances between all layers of a student and all of a teacher.

    Attributes:
        distances: Transport distances ``(S, T)`` on the CPU; NaN where a map meets a sequence, or no plan was found.
        student_layers: Names of the S student layers, in the order in which they complete.
        teacher_layers: Names of the T teacher layers.
        samples: Number of samples seen.
        statistics: The metric behind each distance that is defined, by ``(student layer, teacher layer)``.

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
        """Pairs ``(student layer, teacher layer)`` of least total distance, in order and each layer used once.

        Every layer of the side that has fewer gets a partner where there is one; see
        :func:`lightning_otrt.layers.order.match_in_order`.
        """
        return tuple((self.student_layers[i], self.teacher_layers[j]) for i, j in match_in_order(self.distances))

    @property
    def closest(self) -> dict[str, str]:
        """The closest teacher layer of each student layer, whatever their order; without those that have none."""
        rows = zip(self.student_layers, self.distances.nan_to_num(nan=torch.inf), strict=True)
        return {name: self.teacher_layers[int(row.argmin())] for name, row in rows if bool((row < torch.inf).any())}

    @property
    def plans(self) -> dict[tuple[str, str], Tensor]:
        """The transport plans ``(N, M)`` of the pairs in :attr:`pairing`, solved at each access."""
        return {pair: self.transport(*pair).plan for pair in self.pairing}

    def transport(self, student_layer: str, teacher_layer: str) -> TransportResult:
        """Plan, cost and diagnostics of two layers, in float64; solved at each call rather than kept.

        Raises:
            KeyError: If a layer was not compared.
            ValueError: If the two cannot be compared.
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
        # A metric keeps what it has computed, so that a copy computes.
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
                "`to_dataframe` needs pandas: pip install pandas. Without it, `distances` is a tensor whose rows and "
                "columns are `student_layers` and `teacher_layers`."
            ) from error
        frame = DataFrame(self.distances.numpy(), index=self.student_layers, columns=self.teacher_layers)
        return frame.rename_axis(index="student", columns="teacher")


def compare_representations(
    student: nn.Module,
    teacher: TeacherSource,
    dataloader: Iterable[Any],
    *,
    layers: LayerChoice = "auto",
    teacher_layers: LayerChoice | None = None,
    cost: str = "correlation",
    plan: str = "sinkhorn",
    epsilon: float = 0.01,
    grid: int | None = 4,
    inputs: Callable[[Any], Any] | None = None,
    teacher_inputs: Callable[..., Any] | None = None,
    device: torch.device | str | None = None,
    max_batches: int | None = None,
    progress: bool = True,
) -> RepresentationComparison:
    """Transport distances between all layers of a student and all layers of a teacher, in one pass over the data.

    Each is that of arXiv 2007.06737, equation 2.

    Both networks run in evaluation mode without gradient, and are as before afterwards. The distances are those of all
    batches together, from sums over the observations (:class:`~lightning_otrt.NeuronTransportDistance`), so that memory
    does not grow with the data: one ``(N, M)`` matrix in float64 for each two layers. Two layers are compared at the
    positions that both have; a map cannot be compared with a sequence. Distances over few observations come out too
    small, most of all where a layer without positions takes part: give it several times as many samples as neurons, or
    compare all at ``grid=1``.

    Args:
        student: The student. Names of its layers are relative to this module.
        teacher: A module or whatever else :func:`~lightning_otrt.load_teacher` takes; it may be the student.
        dataloader: Batches. A tensor is the input; of a tuple or list the first element is; a mapping holds keyword
            arguments.
        layers: ``"auto"`` (blocks and the blocks inside them, see
            :func:`~lightning_otrt.layers.comparable.comparable_layers`), ``"all"`` (every layer that can be recorded),
            or names, globs, ``"re:..."``, indices, ``"name:input"``, ``"blocks"`` and ``"penultimate"``, one or a list.
        teacher_layers: The same for the teacher; None: what ``layers`` says for both.
        cost: ``"correlation"``, ``"euclidean"`` or ``"sqeuclidean"``. Only the first is the same in all units, so that
            distances in different layers compare.
        plan: Kind of transport plan.
        epsilon: Entropic regularisation, relative to the mean cost.
        grid: Positions kept along each axis of a feature map; see :func:`~lightning_otrt.reading.neurons.neurons`.
        inputs: From a batch to the student's inputs: a tensor, a tuple of positional or a dictionary of keyword
            arguments. None does as described for ``dataloader``.
        teacher_inputs: From the student's inputs to those of the teacher, returned in the same forms.
        device: Where to run; both networks are brought back. None: where the student is.
        max_batches: Stop after so many batches.
        progress: Show a progress bar.

    Returns:
        The distances with the names of the layers, the best pairing and the plans.

    Raises:
        TypeError: If the student is no module that runs, a batch has no inputs that can be told, or ``cost`` is not a
            name.
        ValueError: If an argument is out of range, there is no batch, a layer name is unknown, or activations are not
            finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_otrt import compare_representations
        >>> student = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU())
        >>> teacher = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        >>> batches = [(torch.randn(16, 1, 12, 12), torch.zeros(16)) for _ in range(2)]
        >>> result = compare_representations(student, teacher, batches, progress=False)
        >>> result.distances.shape, result.student_layers, result.samples
        (torch.Size([2, 2]), ('1', '3'), 32)
        >>> figure, axes = result.plot()
    """
    check_module("student", student)
    check_count("grid", grid, optional=True)
    check_count("max_batches", max_batches, optional=True)
    with ExitStack() as stack:
        runners = Teacher(student, role="student"), Teacher(load_teacher(teacher), inputs=teacher_inputs)
        first = next((tensor for tensor in (*student.parameters(), *student.buffers())), torch.empty(0))
        device = torch.device(device) if device is not None else first.device
        for runner in runners:
            stack.callback(runner.release)
            runner.prepare(device)
            stack.enter_context(in_evaluation(runner.module))
        table: _Table | None = None
        for batch in _batches(dataloader, max_batches, progress):
            own = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch_inputs(batch, inputs))
            given = own, runners[1].inputs_for(*own)
            if table is None:
                # The metric checks its options before any time is spent.
                NeuronTransportDistance(1, 1, cost=cost, plan=plan, epsilon=epsilon)
                chosen = layers, layers if teacher_layers is None else teacher_layers
                table = _Table(runners, given, chosen, grid, {"cost": cost, "plan": plan, "epsilon": epsilon})
                stack.callback(table.remove)
            table.update(runners, given)
        if table is None:
            raise ValueError("Expected argument `dataloader` to give at least one batch, but it is empty.")
        return table.result(progress)


class _Table:
    """The statistics of all pairs of layers while they are gathered."""

    def __init__(
        self,
        runners: tuple[Teacher, Teacher],
        given: tuple[Inputs, Inputs],
        chosen: tuple[LayerChoice, LayerChoice],
        grid: int | None,
        options: Mapping[str, Any],
    ) -> None:
        traces = [trace(runner.module, *inputs) for runner, inputs in zip(runners, given, strict=True)]
        layers = [choose_layers(*each) for each in zip(chosen, traces, ("student", "teacher"), strict=True)]
        self.observers = [
            Observer(side, runner.module, seen, found, grid)
            for side, runner, seen, found in zip(("student", "teacher"), runners, traces, layers, strict=True)
        ]
        self.layers = [tuple(found) for found in layers]
        self.options = options
        self.metrics: dict[tuple[str, str], NeuronTransportDistance] = {}
        self.samples = 0

    def update(self, runners: tuple[Teacher, Teacher], given: tuple[Inputs, Inputs]) -> None:
        """Add a batch."""
        student, teacher = (
            observer(runner.module, *inputs)
            for observer, runner, inputs in zip(self.observers, runners, given, strict=True)
        )
        for side, readings in (("Student", student), ("Teacher", teacher)):
            for name, reading in readings.items():
                check_finite(reading, f"{side} layer {name!r}")
        self.samples += next(iter(student.values())).shape[0]
        for row, y in student.items():
            for column, x in teacher.items():
                if not can_be_compared(y, x):
                    continue
                y_neurons, x_neurons = match_positions(y, x, f"{row!r} -> {column!r}")
                if (row, column) not in self.metrics:
                    metric = NeuronTransportDistance(
                        y_neurons.shape[0], x_neurons.shape[0], **self.options, sync_on_compute=False
                    )
                    self.metrics[row, column] = metric.to(y.device)
                self.metrics[row, column].update(y_neurons, x_neurons)

    def result(self, progress: bool) -> RepresentationComparison:
        """Solve the plans."""
        rows, columns = self.layers
        distances = torch.full((len(rows), len(columns)), torch.nan)
        failed = {}
        with torch.no_grad():
            for pair, metric in tqdm(self.metrics.items(), "Solving plans", disable=not progress, leave=False):
                try:
                    # A copy, whose plan goes with it: all plans together take as much memory as all statistics.
                    distances[rows.index(pair[0]), columns.index(pair[1])] = copy.deepcopy(metric).compute()
                except RuntimeError as error:
                    failed[pair] = error
        if failed:
            pair, reason = next(iter(failed.items()))
            warnings.warn(
                f"{len(failed)} of {len(self.metrics)} distances are NaN, since no plan was found; the first is "
                f"{pair[0]!r} -> {pair[1]!r}: {reason}",
                stacklevel=3,
            )
        return RepresentationComparison(distances, rows, columns, self.samples, dict(self.metrics))

    def remove(self) -> None:
        """Take all hooks off."""
        for observer in self.observers:
            observer.remove()


def batch_inputs(batch: Any, inputs: Callable[[Any], Any] | None = None) -> Inputs:
    """Positional and keyword arguments of a network for a batch: a tensor, the first of a tuple or list, or a mapping.

    Args:
        batch: What a data loader gave.
        inputs: From a batch to a tensor, a tuple of positional or a dictionary of keyword arguments.

    Raises:
        TypeError: If the inputs cannot be told.

    Example:
        >>> import torch
        >>> batch_inputs((torch.zeros(2, 3), torch.zeros(2)))
        ((tensor([[0., 0., 0.],
                [0., 0., 0.]]),), {})
    """
    if inputs is not None:
        batch = inputs(batch)
        if isinstance(batch, tuple):
            return batch, {}
    elif isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    raise TypeError(
        "Expected the inputs of the student to be a tensor, the first element of a tuple or a mapping of keyword "
        f"arguments, but got {type(batch).__name__}. Pass `inputs=`, a function from a batch to a tensor, a tuple or a "
        "dictionary."
    )


def _batches(dataloader: Iterable[Any], max_batches: int | None, progress: bool) -> Iterator[Any]:
    try:
        total = len(dataloader)  # type: ignore[arg-type]
    except TypeError:
        total = None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    yield from tqdm(islice(dataloader, max_batches), "Comparing", total=total, disable=not progress, leave=False)
