"""The controls: plans that no solve decides."""

from __future__ import annotations

from torch import Tensor

from lightning_otrt.steps.coupling import Coupling, Problem
from lightning_otrt.steps.pair_state import PairState, Solved
from lightning_otrt.transport.cost import Cost, Plan
from lightning_otrt.transport.plans import fixed_plan

__all__ = ["FixedCoupling"]


class FixedCoupling(Coupling):
    """The controls, whose plans follow from the numbers of neurons alone and are never solved.

    Args:
        cost: See :class:`Coupling`.
        kind: ``"identity"``, ``"uniform"`` or ``"random"``.
        seed: Seed of random plans; each pair has another one.
    """

    def __init__(self, cost: Cost, kind: str, seed: int) -> None:
        super().__init__(cost)
        self.kind, self.seed = kind, seed

    def prepare(self, state: PairState, y: Tensor, x: Tensor, where: str, index: int) -> None:
        """See :meth:`Coupling.prepare`; sets the plan in the first call."""
        super().prepare(state, y, x, where, index)
        if state.plan is None:
            matrix = fixed_plan(self.kind, y.shape[0], x.shape[0], seed=self.seed + index, where=where)
            assert matrix is not None
            state.plan = Plan.of(matrix.to(y))

    def is_due(self, state: PairState, calls: int) -> bool:
        """Never."""
        return False

    def solve(self, problem: Problem, start: Tensor | None) -> Solved:
        """Never called, since no plan is ever due."""
        raise NotImplementedError("A fixed plan is not solved.")
