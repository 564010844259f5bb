"""Transport over the steps of a training run: when to solve a plan, and from which statistics."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_otrt.steps.first_batch import inspect_batch, inspect_plan
from lightning_otrt.steps.pair_state import PairState
from lightning_otrt.transport.correlation import CorrelationCost
from lightning_otrt.transport.cost import Cost, Plan, Sums, ValueAndGradient, all_finite
from lightning_otrt.transport.custom_cost import CustomCost
from lightning_otrt.transport.gradient import attach_gradients
from lightning_otrt.transport.plans import exact_plan, fixed_plan
from lightning_otrt.transport.sinkhorn import TRAINING_ITERATIONS, WARM_ITERATIONS, sinkhorn_plan
from lightning_otrt.transport.tensor_checks import check_cost
from lightning_otrt.transport.tensors import all_nonzero, common_dtype

__all__ = ["PairDistance", "TransportEngine"]

log = logging.getLogger(__name__)

#: Calls that solve whatever ``solve_every`` is: a student from scratch changes fastest at the start.
EARLY_SOLVES = (0, 1, 2, 4, 8)
#: Decay of the running cost that ``memory="auto"`` chooses, and of the running scale s² of the teacher.
MEMORY = 0.98
#: Samples behind a static plan, and updates of its solves, the last of which nothing will improve.
STATIC_SAMPLES = 256
STATIC_ITERATIONS = 200
#: Up to so many entries a cost matrix is solved together with others of its shape on a CPU, where larger ones fall out
#: of the cache (benchmarks/speed); on CUDA any is.
BATCHED_ENTRIES = 64 * 64


@dataclass(frozen=True, eq=False)
class PairDistance:
    """The distance of one pair of layers in one call.

    Attributes:
        name: Name of the student layer.
        value: ⟨P, M⟩, the mean over views, detached; NaN where the pair was skipped.
        plan: The plan behind it, ``(N, M)``, or None where the pair was skipped.
    """

    name: str
    value: Tensor
    plan: Tensor | None


@dataclass
class TransportEngine:
    """Turns the neurons of all pairs of a call into one differentiable term.

    Args:
        names: ``(student layer, teacher layer)`` of each pair.
        weights: Weight of each pair, summing to 1.
        cost: The ground cost.
        plan: Kind of plan; see :data:`lightning_otrt.transport.plans.PLANS`.
        epsilon: Entropic regularisation relative to the mean cost.
        memory: Decay of the running cost, or ``"auto"``: 0.98 where a call has fewer samples than neurons, else 0.
        solve_every: Calls between two solves.
        seed: Seed of random plans.
        processes: Number of processes that average their gradients of the same term.
        strict: Raise on the first call where there are too few observations; else the pair is skipped.
    """

    names: Sequence[tuple[str, str]]
    weights: Sequence[float]
    cost: Cost
    plan: str
    epsilon: float
    memory: float | str
    solve_every: int
    seed: int
    processes: int = 1
    strict: bool = True
    calls: int = 0
    pairs: list[PairState] = field(default_factory=list)
    bad_calls: Tensor | None = None
    _warned: set[str] = field(default_factory=set)
    _matrices: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """One state for each pair."""
        self.reset()

    def reset(self) -> None:
        """Forget plans, statistics and counters."""
        self.calls = 0
        self.pairs = [PairState() for _ in self.names]
        self.bad_calls = None

    def __call__(
        self, views: Sequence[Sequence[tuple[Tensor, Tensor]]], samples: int, *, reevaluation: bool = False
    ) -> tuple[Tensor, list[PairDistance]]:
        """The term of one call.

        Args:
            views: For each view, the neurons ``(N, n)`` and ``(M, n)`` of each pair.
            samples: Number of samples in all views.
            reevaluation: Whether this is the same batch again (LBFGS): plans and statistics then stay.

        Returns:
            Σ_pairs w_pair · mean over views of ⟨P, M⟩, differentiable once, and the distance of each pair.
        """
        with torch.no_grad(), torch.autocast(views[0][0][0].device.type, enabled=False):
            batches = [[common_dtype(y.detach(), x.detach()) for y, x in pair] for pair in zip(*views, strict=True)]
            # An interrupted call may have left some.
            self._matrices.clear()
            active = [
                index
                for index, batch in enumerate(batches)
                if self._has_enough(index, min(y.shape[-1] for y, _ in batch))
            ]
            if self.calls == 0:
                self._check_first(batches)
            if not reevaluation or self.calls == 0:
                self._observe({index: batches[index] for index in active}, samples)
                self.calls += 1
            return self._evaluate(views, batches, active)

    def _evaluate(
        self,
        views: Sequence[Sequence[tuple[Tensor, Tensor]]],
        batches: Sequence[Sequence[tuple[Tensor, Tensor]]],
        active: Sequence[int],
    ) -> tuple[Tensor, list[PairDistance]]:
        plans = {index: plan for index in active if (plan := self.pairs[index].plan) is not None}
        keys = [(index, view) for index in plans for view in range(len(views))]
        results = dict(zip(keys, self._values(keys, batches, plans), strict=True))
        total: Tensor | None = None
        distances = []
        for index, (student, _) in enumerate(self.names):
            if index not in plans:
                value = batches[index][0][0].new_full((), float("nan"))
                distances.append(PairDistance(student, value, None))
                continue
            values = [results[index, view][0] for view in range(len(views))]
            value = values[0] if len(values) == 1 else torch.stack(values).mean()
            weighted = value * self.weights[index]
            total = weighted if total is None else total + weighted
            distances.append(PairDistance(student, value, plans[index].matrix))
        if total is None:
            total = batches[0][0][0].new_zeros(())
        if self.bad_calls is None:
            self.bad_calls = torch.zeros_like(total, dtype=torch.int64)
        # Of an infinite total, too, it is NaN; `isfinite` would be four operations.
        self.bad_calls += (total - total) != 0
        inputs = [views[view][index][0] for index, view in keys]
        gradients = [results[key][1].to(own.dtype) for key, own in zip(keys, inputs, strict=True)]
        factors = [self.weights[index] / len(views) * self.processes for index, _ in keys]
        with torch.enable_grad():
            return attach_gradients(total, inputs, gradients, factors), distances

    def _values(
        self,
        keys: Sequence[tuple[int, int]],
        batches: Sequence[Sequence[tuple[Tensor, Tensor]]],
        plans: dict[int, Plan],
    ) -> list[ValueAndGradient]:
        """Value and gradient of each pair and view."""
        results: list[ValueAndGradient] = []
        for index, view in keys:
            y, x = batches[index][view]
            plan, energy, matrix = plans[index], self._energy(index), self._matrices.pop(index, None)
            if matrix is None:
                results.append(self.cost.value(y, x, plan, energy))
            else:
                results.append(self.cost.value_of_matrix(y, x, plan, matrix, energy))
        return results

    def _observe(self, batches: dict[int, list[tuple[Tensor, Tensor]]], samples: int) -> None:
        """Feed the statistics, and solve the plans that are due."""
        matrices = {}
        for index, batch in batches.items():
            y, x = batch[0] if len(batch) == 1 else (torch.cat(side, -1) for side in zip(*batch, strict=True))
            state = self.pairs[index]
            if self.cost.scaled:
                energy = self.cost.energy(x)
                if state.energy is not None:
                    # Not `lerp`: the sums also add over processes.
                    fits = (energy[0] - energy[0]) == 0  # is it finite?
                    energy = torch.where(fits, torch.add(energy, state.energy, alpha=MEMORY), state.energy)
                state.energy = energy
            self._fix(index, y, x)
            if self.plan in ("identity", "uniform", "random"):
                continue
            due = self._is_due(state)
            if state.memory is None:
                state.memory = self._memory(samples, max(y.shape[0], x.shape[0]))
            if due:
                matrices[index] = self._matrix(state, y, x, samples)
                if self.cost.needs_matrix and not state.memory and len(batch) == 1:
                    self._matrices[index] = matrices[index]
            elif state.memory and self.plan != "static":
                self._accumulate(state, y, x, samples)
        self._solve(matrices)

    def _is_due(self, state: PairState) -> bool:
        if state.plan is None:
            return True
        if self.plan == "static":
            return state.samples < STATIC_SAMPLES
        return self.calls in EARLY_SOLVES or self.calls % self.solve_every == 0

    def _fix(self, index: int, y: Tensor, x: Tensor) -> None:
        """Set the plan of a control once, from the widths alone."""
        plan = self.pairs[index].plan
        where = "{!r} -> {!r}".format(*self.names[index])
        if plan is not None:
            if plan.matrix.shape != (y.shape[0], x.shape[0]):
                raise ValueError(
                    f"{where} has {y.shape[0]} student and {x.shape[0]} teacher neurons, but its plan, from earlier "
                    f"calls or from a checkpoint, has the shape {tuple(plan.matrix.shape)}. Go on with the networks of "
                    "that run, or call `reset()` to begin anew."
                )
            if plan.matrix.dtype != y.dtype:
                # A run that goes on in another precision.
                self.pairs[index].plan = Plan(*(part.to(y.dtype) for part in plan))
                if (potential := self.pairs[index].potential) is not None:
                    self.pairs[index].potential = potential.to(y.dtype)
                if (reference := self.pairs[index].reference) is not None:
                    self.pairs[index].reference = reference[0].to(y.dtype), reference[1].to(y.dtype)
            return
        fixed = fixed_plan(self.plan, y.shape[0], x.shape[0], seed=self.seed + index, where=where)
        self.pairs[index].plan = None if fixed is None else Plan.of(fixed.to(y))

    def _memory(self, samples: int, neurons: int) -> float:
        if self.plan == "static":
            return 1.0
        if self.memory == "auto":
            # Samples, not observations: positions of one image say much the same, and plans of all blocks that were
            # solved from eight images, and kept for ten steps, cost students some five points (benchmarks/efficiency).
            return MEMORY if samples < neurons else 0.0
        return float(self.memory)

    def _matrix(self, state: PairState, y: Tensor, x: Tensor, samples: int) -> Tensor:
        """The cost matrix to solve a plan from, which is all that is left of the sums where there is no memory."""
        return self.cost.matrix(self._accumulate(state, y, x, samples), self._scale_of(state, x)).to(y.dtype)

    def _accumulate(self, state: PairState, y: Tensor, x: Tensor, samples: int) -> Sums:
        """The sums of a batch, added to the running ones where there are any."""
        if not state.memory:
            return self.cost.sums(y, x)
        if state.reference is None or state.sums is None:
            # Checked by the first call; a pair that was skipped there may begin with a batch that is not finite.
            if state.reference is None:
                means = (side.mean(-1, keepdim=True).nan_to_num_(0.0, 0.0, 0.0) for side in (y, x))
                state.reference = next(means), next(means)
            sums = self.cost.sums(y, x, state.reference)
            fits = all_finite(sums)
            state.sums = [torch.where(fits, part, 0.0) for part in sums]
        else:
            state.sums = self.cost.accumulate(state.sums, state.memory, y, x, state.reference)
        # A static plan is not final before enough samples were finite, squares included.
        if self.plan == "static" and bool(
            (torch.linalg.vector_norm(y) + torch.linalg.vector_norm(x)).square().isfinite()
        ):
            state.samples += samples
        return state.sums

    def _scale_of(self, state: PairState, x: Tensor) -> Tensor:
        return x.new_ones(2) if state.energy is None else state.energy

    def _energy(self, index: int) -> Tensor:
        energy = self.pairs[index].energy
        return torch.empty(0) if energy is None else energy

    def _solve(self, matrices: dict[int, Tensor]) -> None:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, matrix in matrices.items():
            if self.calls == 0 and isinstance(self.cost, CustomCost):
                check_cost(matrix, self.cost.function)
            pays = matrix.is_cuda or matrix.numel() <= BATCHED_ENTRIES
            # A static plan has to have converged when it rests, which a start from an earlier batch can delay.
            warm = self.pairs[index].potential is not None and self.plan != "static"
            groups.setdefault((matrix.shape, matrix.dtype, warm, None if pays else index), []).append(index)
        for indices in groups.values():
            # Taken out of the mapping, so that a matrix is freed as soon as its plan is known.
            group = [matrices.pop(index) for index in indices]
            cost = group.pop()[None] if len(group) == 1 else torch.stack(group)
            del group
            mean = cost.mean((1, 2))
            fits = torch.isfinite(mean)
            potentials: Sequence[Tensor | None]
            if self.plan == "exact":
                matrix = exact_plan(torch.where(fits[:, None, None], cost, 1.0))
                plans, potentials = Plan.of(matrix), [None] * len(indices)
            else:
                states = [state for index in indices if (state := self.pairs[index].potential) is not None]
                start = torch.stack(states) if states and self.plan != "static" else None
                count = TRAINING_ITERATIONS if start is None else WARM_ITERATIONS
                if self.plan == "static":
                    count = STATIC_ITERATIONS
                entropic = sinkhorn_plan(cost, self.epsilon, potential=start, iterations=count, mean=mean)
                # Its last update is that of the rows, which leaves their masses exact.
                student_mass = cost.new_full(cost.shape[:2], 1 / cost.shape[1])
                plans = Plan(entropic.matrix, student_mass, entropic.teacher_mass)
                fits &= torch.isfinite(entropic.marginal_error)
                potentials = list(entropic.potential)
            del cost
            for row, index in enumerate(indices):
                self._keep(self.pairs[index], Plan(*(part[row] for part in plans)), potentials[row], fits[row])
                if self.calls == 0 and self.plan != "exact":
                    for message in inspect_plan(self.names[index], self.pairs[index].plan, self.epsilon):
                        self._warn(message)

    @staticmethod
    def _keep(state: PairState, plan: Plan, potential: Tensor | None, fits: Tensor) -> None:
        """Replace a plan; where its cost was not finite keep the older one, or else match nothing."""
        rows, columns = plan.matrix.shape
        older: Sequence[Tensor | float] = state.plan or (1 / (rows * columns), 1 / rows, 1 / columns)
        state.plan = Plan(*(_where(fits, new, old) for new, old in zip(plan, older, strict=True)))
        if potential is not None:
            state.potential = _where(fits, potential, 0.0 if state.potential is None else state.potential)

    def _has_enough(self, index: int, count: int) -> bool:
        if count >= self.cost.min_observations:
            return True
        student, teacher = self.names[index]
        message = (
            f"{student!r} -> {teacher!r} has {count} observations, and fewer than {self.cost.min_observations} carry "
            f"no {'correlation' if isinstance(self.cost, CorrelationCost) else 'distance'}"
        )
        if self.calls == 0 and self.strict:
            raise ValueError(f"{message}. Use a larger batch, layers with positions or tokens, or cost='euclidean'.")
        self._warn(f"{message}: the pair is skipped for such batches. Use drop_last=True.")
        return False

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)

    def _check_first(self, batches: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> None:
        for names, batch in zip(self.names, batches, strict=True):
            for y, x in batch:
                for message in inspect_batch(names, y, x, self.cost, self.epsilon):
                    self._warn(message)

    def state_dict(self) -> dict[str, Any]:
        """Counters, plans, potentials and statistics: what a resumed run needs to go on as if it had not stopped."""
        return {
            "names": [list(name) for name in self.names],
            "settings": {"cost": self.cost.name, "plan": self.plan, "memory": self.memory},
            "calls": self.calls,
            "pairs": [state.state_dict() for state in self.pairs],
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: If it was saved with other layers, another cost or another kind of plan.
        """
        saved = [tuple(name) for name in state["names"]]
        if saved != [tuple(name) for name in self.names]:
            raise ValueError(
                f"The checkpoint was saved with the layer pairs {saved}, but this run has {list(self.names)}. "
                "Resume with the same `layers`, or load the weights alone."
            )
        settings = state.get("settings", {})
        for name, own in (("cost", self.cost.name), ("plan", self.plan)):
            if settings.get(name, own) != own:
                raise ValueError(
                    f"The checkpoint was saved with {name}={settings[name]!r}, but this run has {name}={own!r}, and "
                    f"statistics and plans of one say nothing to the other. Resume with the same `{name}`, or load the "
                    "weights alone."
                )

        def memory_of(pair: dict[str, Any]) -> float | None:
            if self.plan == "static" or self.memory == settings.get("memory", self.memory) == "auto":
                return pair["memory"]
            # A decay that this run was given is its own; what "auto" did not choose it has to choose.
            return None if self.memory == "auto" else float(self.memory)

        self.calls = state["calls"]
        self.pairs = [PairState.of(pair, memory_of(pair), device) for pair in state["pairs"]]


def _where(fits: Tensor, new: Tensor, old: Tensor | float) -> Tensor:
    """``new`` if it ``fits``, else ``old``, written over ``new``; `where` would take three times as long."""
    if all_nonzero(fits):
        return new
    old = old if isinstance(old, Tensor) else new.new_full((), old)
    return torch.lerp(old.expand_as(new), new.nan_to_num_(0.0, 0.0, 0.0), fits.to(new.dtype), out=new)
