"""Sinkhorn plans: those that are solved again and again, and those that are solved from the first samples and kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_otrt.steps.coupling import Coupling, Due, Problem
from lightning_otrt.steps.first_batch import inspect_plan
from lightning_otrt.steps.pair_state import PairState, Solved
from lightning_otrt.transport.cost import Cost, Plan
from lightning_otrt.transport.orthogonal import Alignment
from lightning_otrt.transport.sinkhorn import BLOCK, EntropicPlan, sinkhorn_plan, training_iterations
from lightning_otrt.transport.tensors import finite

__all__ = ["EntropicCoupling", "StaticCoupling"]

#: A static plan is solved until it is based on so many samples. Its solves take more updates than others, since no
#: later solve corrects the last one.
STATIC_SAMPLES = 256
STATIC_ITERATIONS = 200
#: The marginal error at which a first plan is good enough, and the updates after which it is taken as it is.
FIRST_ERROR, FIRST_ITERATIONS = 1e-2, 2000


class EntropicCoupling(Coupling):
    """Sinkhorn plans.

    Args:
        cost: See :class:`Coupling`.
        epsilon: Entropic regularisation relative to the mean cost.
        memory: See :class:`Coupling`.
        solve_every: See :class:`Coupling`.
    """

    def __init__(self, cost: Cost, epsilon: float, memory: float | str = 0.0, solve_every: int = 1) -> None:
        super().__init__(cost, memory, solve_every)
        self.epsilon = epsilon

    def iterations(self, rows: int, columns: int) -> int:
        """Updates of a solve. There is no early stop: to read the error would wait for the device."""
        return training_iterations(rows, columns)

    def solve(self, problem: Problem, start: Tensor | None) -> Solved:
        """See :meth:`Coupling.solve`."""
        [costs] = problem
        mean, iterations = costs.mean((1, 2)), self.iterations(*costs.shape[1:])
        entropic = sinkhorn_plan(costs, self.epsilon, potential=start, iterations=iterations, mean=mean)
        if start is None:
            entropic = self._finished(costs, mean, entropic)
        # Sinkhorn's last update is that of the rows, so the student's masses are exact.
        student_mass = costs.new_full(costs.shape[:2], 1 / costs.shape[1])
        is_finite = finite(mean + entropic.marginal_error)
        return Solved(Plan(entropic.matrix, student_mass, entropic.teacher_mass), entropic.potential, is_finite)

    def _finished(self, costs: Tensor, mean: Tensor, entropic: EntropicPlan) -> EntropicPlan:
        """A first plan, which may wait for the device, with as many updates as it needs; later ones go on from it.

        Where all neurons depend on one input, it needs a thousand. With too few, layers that do not match cost 0.
        """
        if type(costs) is Tensor and costs.is_cuda and torch.cuda.is_current_stream_capturing():
            return entropic
        for _ in range(FIRST_ITERATIONS // BLOCK):
            if not bool((entropic.marginal_error > FIRST_ERROR).any()):
                break
            entropic = sinkhorn_plan(costs, self.epsilon, potential=entropic.potential, iterations=BLOCK, mean=mean)
        return entropic

    def inspect(self, names: tuple[str, str], plan: Plan | Alignment) -> Iterator[str]:
        """See :func:`inspect_plan`."""
        assert isinstance(plan, Plan)
        return inspect_plan(names, plan, self.epsilon)


class StaticCoupling(EntropicCoupling):
    """A Sinkhorn plan that is solved until 256 samples stand behind it, from all of them, and then kept."""

    # Each plan counts samples of its own.
    may_stack = False

    def __init__(self, cost: Cost, epsilon: float) -> None:
        super().__init__(cost, epsilon, memory=1.0)

    def iterations(self, rows: int, columns: int) -> int:
        """See :meth:`EntropicCoupling.iterations`."""
        return STATIC_ITERATIONS

    def is_due(self, state: PairState, calls: int) -> bool:
        """Until there are enough samples."""
        return state.plan is None or state.samples < STATIC_SAMPLES

    def can_capture(self, is_due: bool) -> bool:
        """Once the plan is final: before, each call reads whether it was finite."""
        return super().can_capture(is_due) and not is_due

    def remembers(self, state: PairState) -> bool:
        """Never: once a call solves nothing, the plan is final."""
        return False

    def observe(self, state: PairState, y: Tensor, x: Tensor, samples: int, is_due: bool) -> Due | None:
        """See :meth:`Coupling.observe`. Until the plan is final this waits for the device."""
        due = super().observe(state, y, x, samples, is_due)
        if due is not None:
            norms = torch.linalg.vector_norm(y) + torch.linalg.vector_norm(x)
            self.count(state, samples, norms.square().isfinite())
        return due

    def count(self, state: PairState, samples: int | Tensor, is_finite: Tensor) -> None:
        """Finite samples only: a plan that rests on others would never be improved."""
        if bool(is_finite):
            state.samples += int(samples)

    def start(self, state: PairState) -> Tensor | None:
        """Always from scratch: from the potential of fewer samples a solve may need more updates than it gets."""
        return None
