"""Plans of an exact solver."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_otrt.steps.coupling import Coupling, Problem
from lightning_otrt.steps.pair_state import Solved
from lightning_otrt.transport.cost import Plan
from lightning_otrt.transport.plans import exact_plan

__all__ = ["ExactCoupling"]


class ExactCoupling(Coupling):
    """Optimal plans, solved on the CPU."""

    def can_capture(self, is_due: bool) -> bool:
        """Between solves."""
        return super().can_capture(is_due) and not is_due

    def solve(self, problem: Problem, start: Tensor | None) -> Solved:
        """See :meth:`Coupling.solve`."""
        [costs] = problem
        is_finite = torch.isfinite(costs.mean((1, 2)))
        return Solved(Plan.of(exact_plan(torch.where(is_finite[:, None, None], costs, 1.0))), None, is_finite)
