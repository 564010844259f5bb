"""Orthogonal couplings in a training run, beside transport plans: rotations, and their random control."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_otrt.steps.coupling import Coupling, Due, Problem
from lightning_otrt.steps.pair_state import PairState, Solved
from lightning_otrt.transport.cost import Cost, Evaluate, Rounds, Sums, ValueAndGradient
from lightning_otrt.transport.orthogonal import Alignment, OrthogonalAlignment, random_projection

__all__ = ["OrthogonalCoupling", "RandomOrthogonalCoupling"]


class OrthogonalCoupling(Coupling):
    """Targets by the best rotation of the teacher's neurons, solved from the sums of the correlation cost.

    Args:
        cost: ``"correlation"`` standardises neurons; with ``"covariance"`` they keep their scale.
        memory: See :class:`Coupling`.
        solve_every: See :class:`Coupling`.
    """

    plan_type = Alignment
    has_value_of_sums = False

    def __init__(self, cost: Cost, memory: float | str = 0.0, solve_every: int = 1) -> None:
        super().__init__(cost, memory, solve_every)
        self.rule = OrthogonalAlignment.of_cost(cost)

    def problem(self, sums: Sums, energy: Tensor | None, dtype: torch.dtype) -> Problem:
        """See :meth:`Coupling.problem`: the cross-correlation, and the scale of each teacher neuron."""
        return [part.to(dtype) for part in self.rule.problem(sums)]

    def due(self, y: Tensor, x: Tensor, energy: Tensor | None) -> Due:
        """See :meth:`Coupling.due`."""
        return Due(self.problem(self.cost.sums(y, x), energy, y.dtype))

    def solve(self, problem: Problem, start: Tensor | None) -> Solved:
        """See :meth:`Coupling.solve`."""
        return _solved(self.rule.align(problem))

    def value(self, state: PairState, y: Tensor, x: Tensor, evaluate: Evaluate | None = None) -> ValueAndGradient:
        """See :meth:`OrthogonalAlignment.value`."""
        assert state.plan is not None
        return self.rule.value(y, x, state.plan.matrix)

    def shared_value(self, state: PairState, y: Tensor, x: Tensor, energy: Tensor | None) -> Rounds:
        """See :meth:`OrthogonalAlignment.shared_value`."""
        assert state.plan is not None
        return self.rule.shared_value(y, x, state.plan.matrix)


class RandomOrthogonalCoupling(OrthogonalCoupling):
    """Its control: a fixed random projection in place of the best. Only the scales of the teacher's neurons follow.

    Args:
        cost: See :class:`OrthogonalCoupling`.
        memory: See :class:`Coupling`.
        solve_every: See :class:`Coupling`.
        seed: Seed of the projections; each pair has another one.
    """

    def __init__(self, cost: Cost, memory: float | str, solve_every: int, seed: int) -> None:
        super().__init__(cost, memory, solve_every)
        self.seed = seed

    def prepare(self, state: PairState, y: Tensor, x: Tensor, where: str, index: int) -> None:
        """See :meth:`Coupling.prepare`; draws the projection in the first call."""
        super().prepare(state, y, x, where, index)
        if state.potential is None:
            state.potential = random_projection(y.shape[0], x.shape[0], self.seed + index).to(y)

    def solve(self, problem: Problem, start: Tensor | None) -> Solved:
        """See :meth:`Coupling.solve`."""
        assert start is not None
        return _solved(self.rule.align(problem, start))


def _solved(found: Alignment) -> Solved:
    """The alignments of a batch of pairs, with whether they are finite: a random matrix is, whatever the student is."""
    return Solved(found, None, (found.matrix.sum((1, 2)) + found.directions).isfinite())
