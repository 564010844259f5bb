"""What all couplings share: when the plan of a pair is solved, from which statistics, and the value that follows.

A coupling is one object for all pairs of a run; what it keeps of a pair is in that pair's :class:`PairState`. The
engine calls :meth:`Coupling.observe` with a batch, :meth:`Coupling.solve` with the problems that this returns, and
:meth:`Coupling.value` with the batch and its plan. A new kind of plan is a subclass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_otrt.steps.pair_state import PairState, Solved
from lightning_otrt.transport.cost import Cost, Evaluate, Plan, Rounds, Sums, ValueAndGradient, all_finite
from lightning_otrt.transport.orthogonal import Alignment
from lightning_otrt.transport.tensors import expanded, finite

__all__ = [
    "EARLY_SOLVES",
    "MEMORY",
    "Coupling",
    "Due",
    "Problem",
]

#: What a plan is solved from: a cost matrix ``(N, M)``, or several tensors. With a leading dimension B in all of them
#: it is a batch of problems.
Problem: TypeAlias = list[Tensor]

#: Calls that solve whatever ``solve_every`` is: a student from scratch changes fastest at the start.
EARLY_SOLVES = (0, 1, 2, 4, 8)
#: Decay of the running cost that ``memory="auto"`` chooses, and of the running scale s² of the teacher.
MEMORY = 0.98


class Due(NamedTuple):
    """A plan that is due.

    Attributes:
        problem: What to solve it from.
        evaluate: Value and gradient of the batch behind the problem, from the plan; None where nothing is saved by it.
    """

    problem: Problem
    evaluate: Evaluate | None = None


class Coupling(ABC):
    """How student neurons are matched to teacher neurons during training.

    Args:
        cost: The ground cost: statistics, cost matrix and value.
        memory: Decay of the running cost, or ``"auto"``: 0.98 where a call has fewer samples than neurons, else 0.
        solve_every: Calls between two solves.
    """

    #: The type of its plans.
    plan_type: type[Plan | Alignment] = Plan
    #: Whether value and gradient follow from the sums behind the plan. Otherwise processes have to exchange more.
    has_value_of_sums = True
    #: Whether several pairs may be computed together.
    may_stack = True

    def __init__(self, cost: Cost, memory: float | str = 0.0, solve_every: int = 1) -> None:
        self.cost, self.memory, self.solve_every = cost, memory, solve_every

    def prepare(self, state: PairState, y: Tensor, x: Tensor, where: str, index: int) -> None:
        """Check the state of a pair against a batch, before its statistics are added.

        Args:
            state: The state of the pair.
            y: Student neurons ``(N, n)``.
            x: Teacher neurons ``(M, n)``.
            where: The layers, for errors.
            index: Place of the pair among all pairs.

        Raises:
            ValueError: If there are other numbers of neurons than before.
        """
        state.check_plan(y, x, where)

    def is_due(self, state: PairState, calls: int) -> bool:
        """Whether a plan is solved in this call, which comes after ``calls`` others."""
        return state.plan is None or calls in EARLY_SOLVES or calls % self.solve_every == 0

    def can_wait(self, state: PairState) -> bool:
        """Whether a plan that is due is better left as it is than solved from a batch that is far smaller than others.

        A running cost has earlier batches, too. Without one the batch decides alone, and for many calls.
        """
        return state.plan is not None and state.memory == 0

    def can_capture(self, is_due: bool) -> bool:
        """Whether a call, with a plan that is due or not, is operations on the device alone, as a CUDA graph is."""
        return self.cost.can_be_captured

    def remembers(self, state: PairState) -> bool:
        """Whether calls that solve no plan still add to the running cost."""
        return bool(state.memory)

    def choose_memory(self, samples: int, neurons: int) -> float:
        """Decay of the running cost of a pair with so many neurons on its wider side."""
        if self.memory == "auto":
            # Samples, not observations: positions of one image say much the same. Plans of all blocks that were solved
            # from eight images and kept for ten steps cost students some five points (benchmarks/efficiency).
            return MEMORY if samples < neurons else 0.0
        return float(self.memory)

    def resumed_memory(self, saved: float | None, setting: float | str) -> float | None:
        """Decay with which a saved pair goes on; None if it has to be chosen again.

        Args:
            saved: Decay of the pair in the saved run.
            setting: The ``memory`` that the saved run was given.
        """
        if self.memory != "auto":
            return float(self.memory)
        return saved if setting == "auto" else None

    def observe(self, state: PairState, y: Tensor, x: Tensor, samples: int, is_due: bool) -> Due | None:
        """Add a batch of one process to the statistics of a pair, or of several pairs of equal shape.

        Args:
            state: The state of the pair, or of several ``(B, ...)``.
            y: Student neurons ``(..., N, n)``.
            x: Teacher neurons ``(..., M, n)``.
            samples: Samples of the batch, each of which has one or more observations.
            is_due: Whether a plan is solved in this call; see :meth:`is_due`.

        Returns:
            What to solve a plan from, with the dimensions of the batch in front; None if no plan is due.
        """
        if self.cost.scaled:
            energy = self.cost.energy(x)
            before = torch.zeros_like(energy) if state.energy is None else state.energy
            is_finite = finite(energy[..., :1])
            state.energy = torch.where(is_finite, torch.add(energy, before, alpha=MEMORY), before)
        if state.memory is None:
            state.memory = self.choose_memory(samples, max(y.shape[-2], x.shape[-2]))
        if not is_due and not self.remembers(state):
            return None
        if not state.memory:
            return self.due(y, x, state.energy)
        sums = self._feed(state, y, x, state.memory)
        return Due(self.problem(sums, state.energy, y.dtype)) if is_due else None

    def due(self, y: Tensor, x: Tensor, energy: Tensor | None) -> Due:
        """What to solve a plan from where it sees this batch alone."""
        matrix, evaluate = self.cost.matrix_and_value(y, x, energy)
        return Due([matrix], evaluate)

    def problem(self, sums: Sums, energy: Tensor | None, dtype: torch.dtype) -> Problem:
        """What to solve a plan from, in the type of the neurons: the cost matrix of these sums."""
        return [self.cost.matrix(sums, energy).to(dtype)]

    def _feed(self, state: PairState, y: Tensor, x: Tensor, memory: float) -> Sums:
        """The running sums with this batch."""
        if state.sums is not None and state.reference is not None:
            state.sums = self.cost.accumulate(state.sums, memory, y, x, state.reference)
            return state.sums
        if state.reference is None:
            # The first call refuses values that are not finite, but a pair that it skipped may begin with some.
            means = (side.mean(-1, keepdim=True).nan_to_num_(0.0, 0.0, 0.0) for side in (y, x))
            state.reference = next(means), next(means)
        sums = self.cost.sums(y, x, state.reference)
        is_finite = all_finite(sums)
        state.sums = [torch.where(expanded(is_finite, part), part, 0.0) for part in sums]
        return state.sums

    def count(self, state: PairState, samples: int | Tensor, is_finite: Tensor) -> None:  # noqa: B027 - optional
        """Count the samples behind a plan, for a coupling that stops solving once there are enough."""

    def start(self, state: PairState) -> Tensor | None:
        """Potential ``(M,)`` from which the next solve starts; None for a start from scratch."""
        return state.potential

    @abstractmethod
    def solve(self, problem: Problem, start: Tensor | None) -> Solved:
        """Plans of a batch of pairs.

        Args:
            problem: Of :meth:`problem`, with a leading dimension B. Values that are not finite are allowed.
            start: What :meth:`start` gave for each pair, ``(B, ...)``, or None.

        Returns:
            The plans, with a leading dimension B in every part.
        """

    def inspect(self, names: tuple[str, str], plan: Plan | Alignment) -> Iterator[str]:
        """Warnings about the first plan of a pair."""
        yield from ()

    def value(self, state: PairState, y: Tensor, x: Tensor, evaluate: Evaluate | None = None) -> ValueAndGradient:
        """⟨P, M⟩ of a batch of one process, and its gradient with respect to the student neurons.

        Args:
            state: The state of the pair, or of several ``(B, ...)``, with a plan.
            y: Student neurons ``(..., N, n)``.
            x: Teacher neurons ``(..., M, n)``.
            evaluate: That of :class:`Due`, if the plan was solved from this batch.
        """
        assert isinstance(state.plan, Plan)
        return evaluate(state.plan) if evaluate else self.cost.value(y, x, state.plan, state.energy)

    def shared_value(self, state: PairState, y: Tensor, x: Tensor, energy: Tensor | None) -> Rounds:
        """:meth:`value` where several processes each hold a part of the batch; see :meth:`Cost.shared_value`."""
        assert isinstance(state.plan, Plan)
        return self.cost.shared_value(y, x, state.plan, energy)

    def value_of_sums(
        self,
        state: PairState,
        y: Tensor,
        x: Tensor,
        sums: Sums,
        energy: Tensor | None,
        reference: tuple[Tensor, Tensor],
    ) -> ValueAndGradient:
        """:meth:`shared_value` without any exchange, where the sums are known; see :meth:`Cost.value_of_sums`."""
        assert isinstance(state.plan, Plan)
        return self.cost.value_of_sums(y, x, state.plan, sums, energy, reference)
