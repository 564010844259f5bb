"""Compare all layers of a student with all layers of a teacher over a data set, in one pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_otrt.analysis.batches import Inputs, batch_inputs, check_accepted, check_batches, to_device
from lightning_otrt.analysis.comparison import RepresentationComparison
from lightning_otrt.analysis.metric import NeuronTransportDistance
from lightning_otrt.checks import check_count, check_module
from lightning_otrt.layers.comparable import LayerChoice, choose_layers
from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.notices import warn
from lightning_otrt.reading.chance import MIN_SAMPLES, OtherSamples
from lightning_otrt.reading.extra_forwards.evaluation import in_evaluation
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.hooks.observer import Observer
from lightning_otrt.reading.neurons.positions import can_be_compared, has_one_position, match_positions
from lightning_otrt.reading.probes.token_order import settle_token_order
from lightning_otrt.reading.traced.network_call import NetworkCall
from lightning_otrt.reading.tracer import trace
from lightning_otrt.reading.warnings.other_orders import OrderedSide, warn_of_other_orders
from lightning_otrt.reading.warnings.samples import warn_of_other_axes, warn_of_other_samples
from lightning_otrt.steps.first_batch import dead_neurons
from lightning_otrt.teacher.frozen.frozen_teacher import Teacher
from lightning_otrt.teacher.frozen.past_states import PastStates
from lightning_otrt.teacher.frozen.teacher_call import TeacherCall
from lightning_otrt.teacher.loading.load import TeacherSource, load_teacher
from lightning_otrt.transport.correlation import CorrelationCost
from lightning_otrt.transport.tensor_checks import check_finite

__all__ = ["compare_representations"]


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

    Each distance is that of arXiv 2007.06737, equation 2, over the observations of all batches together
    (:class:`~lightning_otrt.NeuronTransportDistance`). Memory does not grow with the data: two ``(N, M)`` matrices in
    float64 for each pair of layers. Both networks run in evaluation mode without gradient; their modes and buffers are
    restored afterwards.

    Two layers are compared at the positions that both have; a map cannot be compared with a sequence. Distances by
    chance differ from layer to layer: they are smaller for wider layers, over few observations, and where zero padding
    shows at the border of each map. So the same pass also measures the distance by chance, which is that to the
    teacher's layer on other samples, and layers are paired by the ratio of the two. For it each sample is compared with
    the one before it in its batch, so shuffle the batches.

    Args:
        student: The student. Names of its layers are relative to this module.
        teacher: A module or whatever else :func:`~lightning_otrt.load_teacher` takes; it may be the student.
        dataloader: Batches. The input is the batch itself if it is a tensor, the first element of a tuple or list; a
            mapping gives keyword arguments.
        layers: ``"auto"`` (blocks, and the blocks inside them as long as there are at most 40 layers), ``"all"``
            (every layer that can be recorded), or names, globs, ``"re:..."``, indices, ``"name:input"``, ``"blocks"``
            and ``"penultimate"``, one or a list.
        teacher_layers: The same for the teacher. None applies ``layers`` to both.
        cost: ``"correlation"``, ``"euclidean"`` or ``"sqeuclidean"``; for an orthogonal plan also ``"covariance"``.
            Only the correlation does not depend on the scale of each neuron, so that distances of different layers can
            be compared.
        plan: ``"sinkhorn"``, ``"exact"``, ``"orthogonal"`` (the best rotation), or a control: ``"identity"``,
            ``"uniform"``, ``"random"``, ``"random_orthogonal"``.
        epsilon: Entropic regularisation, relative to the mean cost.
        grid: Positions kept along each axis of a feature map; see :func:`~lightning_otrt.neurons`.
        inputs: Function from a batch to the student's inputs: a tensor, a tuple of positional arguments or a dictionary
            of keyword arguments. None uses the rule of ``dataloader``.
        teacher_inputs: Function from the student's inputs to those of the teacher, in the same forms.
        device: Device to run on; both networks are moved back afterwards. None uses the device of the student.
        max_batches: Stop after so many batches.
        progress: Show a progress bar.

    Returns:
        The distances, those by chance, the names of the layers, the best pairing and the plans.

    Raises:
        TypeError: If the student is not a module with a ``forward``, the inputs in a batch are not known, or ``cost``
            is not a name.
        ValueError: If an argument is out of range, there are fewer than two samples, a layer name is unknown, or
            activations are not finite.

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
    check_batches(dataloader)
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
            own = to_device(batch_inputs(batch, inputs), device)
            if table is None:
                check_accepted(student, own)
                states = PastStates(student, "forward", own[0], own[1], runners[1].source)
                runners[1].call = TeacherCall(past_states=states)
            given = own, runners[1].inputs_for(*own)
            if table is None:
                # This checks the options of the metric before any forward runs.
                NeuronTransportDistance(1, 1, cost=cost, plan=plan, epsilon=epsilon)
                chosen = layers, layers if teacher_layers is None else teacher_layers
                options = {"cost": cost, "plan": plan, "epsilon": epsilon}
                table = _Table(runners, _own(given), chosen, grid, options)
                stack.callback(table.remove)
            table.update(_own(given))
        if table is None:
            raise ValueError("Expected argument `dataloader` to give at least one batch, but it is empty.")
        return table.result(progress)


def _own(given: tuple[Inputs, Inputs]) -> tuple[Inputs, Inputs]:
    """Copies for each network, which may write to them: the other one gets the same tensors, which are the user's."""
    student, teacher = (InputGuard(clones=True).copied(inputs) for inputs in given)
    return student, teacher


class _Table:
    """Two metrics for each pair of layers, on the same and on other samples, updated batch by batch."""

    def __init__(
        self,
        runners: tuple[Teacher, Teacher],
        given: tuple[Inputs, Inputs],
        chosen: tuple[LayerChoice, LayerChoice],
        grid: int | None,
        options: Mapping[str, Any],
    ) -> None:
        self.runners = runners
        traces = [trace(runner.module, *inputs) for runner, inputs in zip(runners, given, strict=True)]
        layers = [choose_layers(*each) for each in zip(chosen, traces, ("student", "teacher"), strict=True)]
        traces = [
            settle_token_order(runner.module, seen, names, inputs)
            for runner, seen, names, inputs in zip(runners, traces, layers, given, strict=True)
        ]
        crossed = [
            LayerPair(row, column, neuron_axis=(layers[0][row], layers[1][column])) for row, column in product(*layers)
        ]
        if not runners[1].has_inputs:
            warn_of_other_axes(*traces)
        warn_of_other_samples(crossed, *traces)
        student, teacher = (
            OrderedSide(NetworkCall(runner.module, inputs), seen)
            for runner, seen, inputs in zip(runners, traces, given, strict=True)
        )
        warn_of_other_orders(crossed, student, teacher, grid)
        self.observers = [
            Observer(side, runner.module, seen, found, grid)
            for side, runner, seen, found in zip(("student", "teacher"), runners, traces, layers, strict=True)
        ]
        self.layers = tuple(layers[0]), tuple(layers[1])
        self.options = options
        self.metrics: dict[tuple[str, str], NeuronTransportDistance] = {}
        self.by_chance: dict[tuple[str, str], NeuronTransportDistance] = {}
        self.pooled: set[tuple[str, str]] = set()
        self.others = OtherSamples()
        self.samples = 0

    def update(self, given: tuple[Inputs, Inputs]) -> None:
        """Add a batch."""
        student, teacher = (
            observer(runner.module, *inputs)
            for observer, runner, inputs in zip(self.observers, self.runners, given, strict=True)
        )
        for side, readings in (("Student", student), ("Teacher", teacher)):
            for name, reading in readings.items():
                check_finite(reading, f"{side} layer {name!r}")
                if self.samples == 0 and self.options["cost"] == "correlation":
                    _warn_of_dead(f"{side} layer {name!r}", reading)
        self.samples += next(iter(student.values())).shape[0]
        shuffled = {column: self.others(column, x) for column, x in teacher.items()}
        for row, y in student.items():
            for column, x in teacher.items():
                if not can_be_compared(y, x):
                    continue
                if has_one_position(y) != has_one_position(x):
                    self.pooled.add((row, column))
                self._add(self.metrics, (row, column), y, x)
                other = shuffled[column]
                if other is not None:
                    self._add(self.by_chance, (row, column), y, other)

    def _add(
        self,
        metrics: dict[tuple[str, str], NeuronTransportDistance],
        pair: tuple[str, str],
        student: Tensor,
        teacher: Tensor,
    ) -> None:
        y, x = match_positions(student, teacher, f"{pair[0]!r} -> {pair[1]!r}")
        if pair not in metrics:
            metric = NeuronTransportDistance(y.shape[0], x.shape[0], **self.options, sync_on_compute=False)
            metrics[pair] = metric.to(y.device)
        metrics[pair].update(y, x)

    def result(self, progress: bool) -> RepresentationComparison:
        """Solve all plans."""
        if self.samples < MIN_SAMPLES:
            raise ValueError(
                f"Expected argument `dataloader` to give at least {MIN_SAMPLES} samples, but got {self.samples}: the "
                "distance by chance is that to the teacher's layer with other samples. Give more data."
            )
        failed: dict[tuple[str, str], RuntimeError] = {}
        with (
            torch.no_grad(),
            tqdm(total=2 * len(self.metrics), desc="Solving plans", disable=not progress, leave=False) as bar,
        ):
            distances, chance = (self._solve(metrics, failed, bar) for metrics in (self.metrics, self.by_chance))
        if failed:
            pair, reason = next(iter(failed.items()))
            warn(
                f"{len(failed)} of {len(self.metrics)} distances are NaN, because no plan was found. The first is "
                f"{pair[0]!r} -> {pair[1]!r}: {reason}",
            )
        rows, columns = self.layers
        pooled = torch.tensor([[(row, column) in self.pooled for column in columns] for row in rows])
        return RepresentationComparison(distances, chance, pooled, *self.layers, self.samples, dict(self.metrics))

    def _solve(
        self,
        metrics: Mapping[tuple[str, str], NeuronTransportDistance],
        failed: dict[tuple[str, str], RuntimeError],
        bar: tqdm[Any],
    ) -> Tensor:
        rows, columns = self.layers
        distances = torch.full((len(rows), len(columns)), torch.nan)
        for pair, metric in metrics.items():
            try:
                # A metric keeps its last plan, which is as large as its statistics. That of a copy is freed.
                distances[rows.index(pair[0]), columns.index(pair[1])] = copy.deepcopy(metric).compute()
            except RuntimeError as error:
                failed.setdefault(pair, error)
            bar.update()
        return distances

    def remove(self) -> None:
        """Remove all hooks."""
        for observer in self.observers:
            observer.remove()


def _warn_of_dead(where: str, reading: Tensor) -> None:
    """Warn where most neurons of a reading ``(B, N, *positions)`` are dead, so that its distances say nothing."""
    neurons = reading.transpose(0, 1).flatten(1)
    if neurons.shape[1] >= CorrelationCost.min_observations:
        for text in dead_neurons(where, neurons, "Check its inputs and weights", "cost='euclidean'"):
            warn(text)


def _batches(dataloader: Iterable[Any], max_batches: int | None, progress: bool) -> Iterator[Any]:
    try:
        total = len(dataloader)  # type: ignore[arg-type]
    except TypeError:
        total = None
    if max_batches is not None:
        total = max_batches if total is None else min(total, max_batches)
    yield from tqdm(islice(dataloader, max_batches), "Comparing", total=total, disable=not progress, leave=False)
