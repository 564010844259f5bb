"""The transport distance over a whole data set, as a metric of torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.plot import plot_single_or_multi_val

from lightning_otrt.checks import check_count, check_seed, shown
from lightning_otrt.notices import rank_zero_warn
from lightning_otrt.transport.cost import Plan, Sums
from lightning_otrt.transport.distance import TransportResult
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.orthogonal import OrthogonalAlignment, fixed_projection
from lightning_otrt.transport.plans import (
    ONE_BATCH_PLANS,
    ORTHOGONAL,
    check_epsilon,
    check_plan,
    check_plan_and_cost,
    fixed_plan,
    solve_plan,
)
from lightning_otrt.transport.tensor_checks import check_finite, check_floating
from lightning_otrt.transport.tensors import lacks_float64

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["NeuronTransportDistance"]

#: Number of observations converted to float64 at a time. A whole batch at once would triple its memory.
_CHUNK = 16_384


class NeuronTransportDistance(Metric):
    r"""Optimal transport distance between the neurons of a student and those of a teacher, over all their observations.

    .. math:: \Omega(T, S) = \langle P^*, M\rangle = \min_{P \in \Pi(a, b)} \sum_{ij} P_{ij} M_{ij}

    with uniform masses (arXiv 2007.06737, equation 2). The cost M is that of all observations since the last reset, on
    all processes; the result is not an average over batches. Only sums over observations are kept, so the metric needs
    the memory of one ``(N, M)`` matrix, whatever the size of the data.

    The same as a function is :func:`~lightning_otrt.transport_distance`: its ``value`` on all observations at once
    equals ``compute``.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``student`` (:class:`~torch.Tensor`): Student neurons ``(N, n)``: rows are neurons, columns observations.
      :func:`~lightning_otrt.neurons` makes them from the output of a layer.
    - ``teacher`` (:class:`~torch.Tensor`): Teacher neurons ``(M, n)`` on the same observations. ``n`` may differ
      between batches, and may be zero.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``distance`` (:class:`~torch.Tensor`): A scalar, not negative; NaN, with a warning, if there were too few
      observations (none, or fewer than 3 for the correlation).

    The statistics stay in float64, also after ``set_dtype`` or ``half`` and under a Trainer's precision. An Apple GPU
    has no float64: there they stay on the CPU, and so does the value. ``dtype`` is
    the type of the value; if it is float64, entropic plans are solved in float64, else in float32. ``forward`` solves a
    plan for each batch: call ``update`` instead where the value of the batch is not needed.

    Args:
        num_student_neurons: N. The widths are arguments because a process without data needs them, too: it takes part
            in the sum over processes.
        num_teacher_neurons: M.
        cost: ``"correlation"`` (1 - r), ``"euclidean"`` or ``"sqeuclidean"`` (both in units of the teacher's root mean
            square activation and per observation), or ``"covariance"`` for an orthogonal plan; see
            :func:`~lightning_otrt.transport_distance`.
        plan: ``"sinkhorn"`` (entropic), ``"exact"``, ``"orthogonal"`` (the best rotation, which takes another
            ``(M, M)`` matrix of memory), or a control: ``"identity"``, ``"uniform"``, ``"random"``,
            ``"random_orthogonal"``.
        epsilon: Entropic regularisation, relative to the mean cost.
        seed: Seed of random plans and rotations.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range, if plan and cost do not go together, or if ``plan="identity"`` is
            used with different widths.
        TypeError: If ``cost`` is not a name or ``seed`` not an integer.

    Example:
        >>> import torch
        >>> from lightning_otrt import NeuronTransportDistance
        >>> generator = torch.Generator().manual_seed(0)
        >>> metric = NeuronTransportDistance(16, 32)
        >>> for _ in range(4):
        ...     teacher = torch.randn(32, 100, generator=generator)
        ...     metric.update(teacher[::2], teacher)  # a student that has every second neuron of its teacher
        >>> round(metric.compute().item(), 2)
        0.46
        >>> metric.transport().plan.shape
        torch.Size([16, 32])
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    def __init__(
        self,
        num_student_neurons: int,
        num_teacher_neurons: int,
        *,
        cost: str = "correlation",
        plan: str = "sinkhorn",
        epsilon: float = 0.01,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_count("num_student_neurons", num_student_neurons)
        check_count("num_teacher_neurons", num_teacher_neurons)
        if not isinstance(cost, str):
            raise TypeError(
                f"Expected argument `cost` to be a name, but got {shown(cost)}. The metric adds up sums over "
                "observations, and a cost of your own may not be such a sum. Use "
                "`transport_distance(student, teacher, cost=...)` on all observations at once."
            )
        check_plan(plan, allowed=ONE_BATCH_PLANS)
        check_epsilon(epsilon)
        check_seed("seed", seed)
        # Raises now, not at the end of an epoch, if a control plan does not fit the widths.
        fixed_plan(plan, num_student_neurons, num_teacher_neurons, seed=seed, where="the metric")
        self.num_student_neurons = num_student_neurons
        self.num_teacher_neurons = num_teacher_neurons
        self.cost = cost
        self.plan = plan
        self.epsilon = epsilon
        self.seed = seed
        self._rule = get_cost(cost)
        check_plan_and_cost(plan, self._rule)
        self._transport: TransportResult | None = None
        nothing = self._sums_of(
            torch.zeros(num_student_neurons, 0, dtype=torch.float64),
            torch.zeros(num_teacher_neurons, 0, dtype=torch.float64),
        )
        self._shapes = [tensor.shape for tensor in nothing]
        # Not in the body of the class: TorchScript reads annotations there, and fails on postponed ones.
        self.sums: Tensor
        # One flat tensor, because torchmetrics runs one collective for each state.
        self.add_state("sums", default=_flatten(nothing), dist_reduce_fx="sum")

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Add the observations of one batch.

        Args:
            student: Student neurons ``(N, n)``.
            teacher: Teacher neurons ``(M, n)`` on the same observations.

        Raises:
            TypeError: If the neurons are not floating-point tensors.
            ValueError: If shapes do not fit or values are not finite; the batch is then not counted.
        """
        self._check("student", student, self.num_student_neurons)
        self._check("teacher", teacher, self.num_teacher_neurons)
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"Expected `student` {tuple(student.shape)} and `teacher` {tuple(teacher.shape)} to have the same "
                "number of observations (the second axis): they are paired one to one."
            )
        for start in range(0, student.shape[1], _CHUNK):
            chunk = slice(start, start + _CHUNK)
            sums = self._sums_of(*(_in_float64(side.detach()[:, chunk]) for side in (student, teacher)))
            self.sums = self.sums + _flatten(sums)

    def compute(self) -> Tensor:
        """The transport distance over all observations of all processes, a scalar."""
        *sums, last = self._unflatten()
        count = int(sums[0])
        if count < self._rule.min_observations:
            if count > 0:
                rank_zero_warn(
                    f"{type(self).__name__} has seen {count} observations, too few for cost={self.cost!r}, which needs "
                    f"{self._rule.min_observations}; the distance is NaN."
                )
            self._transport = None
            return self.sums.new_tensor(math.nan, dtype=self.dtype)
        if self.plan in ORTHOGONAL:
            self._transport = self._align(sums, last)
        else:
            self._transport = self._solve(self._rule.matrix(sums, last))
        return self._transport.value.to(self.dtype)

    def transport(self) -> TransportResult:
        """The plan, the cost and the diagnostics behind ``compute``, in float64.

        After ``compute`` it needs no communication, so a single process may call it, to draw the plan for example.

        Raises:
            ValueError: If too few observations have been seen.

        Example:
            >>> import torch
            >>> from lightning_otrt import NeuronTransportDistance
            >>> metric = NeuronTransportDistance(4, 4, plan="exact")
            >>> teacher = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
            >>> metric.update(teacher[[2, 0, 3, 1]], teacher)
            >>> metric.transport().plan.argmax(1)
            tensor([2, 0, 3, 1])
        """
        self.compute()
        if self._transport is None:
            raise ValueError(
                f"There is no transport plan: {type(self).__name__} with cost={self.cost!r} needs at least "
                f"{self._rule.min_observations} observations. Call `update` first."
            )
        return self._transport

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure | None, Axes]:
        """Plot one or several values of the metric. To draw its plan use :func:`~lightning_otrt.plot_plan`.

        Args:
            val: A result of ``forward`` or ``compute``, or a list of them. None plots the result of ``compute``.
            ax: Axes to draw on.

        Returns:
            The figure (None where ``ax`` is given) and the axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.

        Example:
            >>> import torch
            >>> from lightning_otrt import NeuronTransportDistance
            >>> metric = NeuronTransportDistance(8, 8)
            >>> figure, axes = metric.plot([metric(torch.randn(8, 50), torch.randn(8, 50)) for _ in range(3)])
        """
        drawn = plot_single_or_multi_val(
            self.compute() if val is None else val,
            ax=ax,
            higher_is_better=self.higher_is_better,
            lower_bound=self.plot_lower_bound,
            name=type(self).__name__,
        )
        return cast("tuple[Figure | None, Axes]", drawn)

    def reset(self) -> None:
        """Forget all observations."""
        super().reset()
        self._transport = None

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the observations of another metric of the same widths and cost, or of its state.

        Raises:
            ValueError: If its sums are those of other widths or of another cost.
        """
        if isinstance(incoming_state, Metric):
            if not isinstance(incoming_state, NeuronTransportDistance) or _kind(self) != _kind(incoming_state):
                raise ValueError(f"Expected a metric of the same widths and cost as {self}, but got {incoming_state}.")
        elif isinstance(incoming_state, dict) and "sums" in incoming_state:
            found = getattr(incoming_state["sums"], "shape", None)
            if found != self.sums.shape:
                raise ValueError(
                    f"Expected the state of a metric of the same widths and cost as {self}, with sums of shape "
                    f"{tuple(self.sums.shape)}, but got {found and tuple(found)}."
                )
        super().merge_state(incoming_state)
        # torchmetrics would give the value of before, and warn that there was no update.
        self._computed = None
        self._update_count += incoming_state._update_count if isinstance(incoming_state, Metric) else 1

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        return (
            f"{self.num_student_neurons}, {self.num_teacher_neurons}, cost={self.cost!r}, plan={self.plan!r}, "
            f"epsilon={self.epsilon!r}, seed={self.seed!r}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # torchmetrics overrides this method of `nn.Module` too; its `exclude_state` leaves a state to the subclass.
        # `set_dtype`, or `to` of a module that holds the metric, would cast the sums to a type with too few digits.
        # `fn` may move and cast at once: only the move is applied here. `reset` takes the device from the state.
        def move(tensor: Tensor) -> Tensor:
            if lacks_float64(fn(torch.empty(0, device=tensor.device))):
                return tensor
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(fn, exclude_state=(*exclude_state, "sums"))
        self.sums = move(self.sums)
        if self._transport is not None:
            tensors = {name: part for name, part in vars(self._transport).items() if part is not None}
            self._transport = replace(self._transport, **{name: move(tensor) for name, tensor in tensors.items()})
        return self

    def _check(self, name: str, neurons: Tensor, width: int) -> None:
        check_floating(name, neurons)
        if neurons.dim() != 2 or neurons.shape[0] != width:
            hint = " Is it (observations, neurons)? Transpose it." if neurons.shape[1:] == (width,) else ""
            raise ValueError(
                f"Expected argument `{name}` to have the shape (neurons, observations) with {width} neurons, as set by "
                f"`num_{name}_neurons`, but got {tuple(neurons.shape)}.{hint}"
            )
        check_finite(neurons, f"`{name}`")

    def _sums_of(self, y: Tensor, x: Tensor) -> Sums:
        """Sums of float64 neurons, with what scales the cost, or gives the norms of rotated teacher neurons, last."""
        # Moments around zero. Moments around a reference taken from the data could not be added up, because each
        # process has other data. In float64 no reference is needed: over 2,000 batches cancellation changes 1 - r by
        # 5e-9 at mean / std = 1e3 and by 4e-7 at 1e4. The rounding of float32 activations changes it by 4e-7 and 7e-6.
        zeros = y.new_zeros(y.shape[0], 1), x.new_zeros(x.shape[0], 1)
        last = x @ x.mT if self.plan in ORTHOGONAL else self._rule.energy(x)
        return [*self._rule.sums(y, x, reference=zeros), last]

    def _unflatten(self) -> Sums:
        parts = self.sums.split_with_sizes([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _solve(self, matrix: Tensor) -> TransportResult:
        # In float32 an entropic plan has the same five digits and takes half the time. An exact plan is a vertex of the
        # set of plans, and rounding of the cost may select another vertex.
        precise = self.plan != "sinkhorn" or self.dtype == torch.float64
        cost = matrix if precise else matrix.float()
        coupling = solve_plan(cost[None], self.plan, self.epsilon, self.seed)[0].to(matrix)
        return TransportResult.of((coupling * matrix).sum(), Plan.of(coupling), matrix)

    def _align(self, sums: Sums, squares: Tensor) -> TransportResult:
        rule = OrthogonalAlignment.of_cost(self._rule)
        projection = fixed_projection(self.plan, self.num_student_neurons, self.num_teacher_neurons, seed=self.seed)
        alignment = rule.align(rule.problem(sums), projection)
        value = rule.value_of_sums(sums, squares, alignment.matrix)
        return TransportResult.of(value, alignment, self._rule.matrix(sums, None))


def _kind(metric: NeuronTransportDistance) -> tuple[Any, ...]:
    """What its sums depend on. Not a property of the class, whose annotations TorchScript would read."""
    return metric.num_student_neurons, metric.num_teacher_neurons, metric.cost, metric.plan in ORTHOGONAL


def _in_float64(neurons: Tensor) -> Tensor:
    return (neurons.cpu() if lacks_float64(neurons) else neurons).double()


def _flatten(sums: Sums) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in sums])
