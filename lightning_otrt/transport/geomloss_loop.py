"""The start of an entropic plan: GeomLoss' annealed Sinkhorn loop on our own softmin. No other file imports GeomLoss.

GeomLoss' loop is symmetric: each iteration moves both potentials halfway to their updates, at an ε that falls from a
large value (J. Feydy, Geometric data analysis, beyond convolutions, 2020, algorithm 3.5). It takes any softmin. Ours is
a matrix-vector product on a kernel with absorbed potentials, several times faster than exponentials of the whole cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from geomloss.ot import solve_batch
from torch import Tensor

from lightning_otrt.transport.tensors import matrix_vector

try:
    # Private modules, the only way to pass a softmin. If a release of GeomLoss moves them, its public solver is used.
    from geomloss._typing import CostMatrices, DescentParameters, SinkhornPotentials
    from geomloss.ot._abstract_solvers.sinkhorn_ot import sinkhorn_loop
except ImportError:  # pragma: no cover - only with a GeomLoss that the contract test has not seen
    sinkhorn_loop = None

__all__ = ["EXPONENT_LIMIT", "ScalingSoftmin", "annealed_potential", "annealing", "run_geomloss_loop"]

#: The loop starts at this ε, in units of the mean cost, and divides it by this factor while it stays above the last ε.
#: Each ε has one iteration: a second one brings the marginals of a training solve no closer than a few more updates at
#: the last ε, which take fewer operations.
START = 0.2
FACTOR = 5.0
#: Exponents beyond which scalings and kernels are clamped: e^±40 squared stays within float32.
EXPONENT_LIMIT = 40.0


def annealing(epsilon: float) -> list[float]:
    """ε of each iteration of the loop: what comes before the updates at the last ``epsilon``.

    Example:
        >>> annealing(0.01)
        [0.2, 0.04]
        >>> annealing(0.5)
        [0.5]
    """
    stages = [max(START, epsilon)]
    while stages[-1] / FACTOR > epsilon:
        stages.append(stages[-1] / FACTOR)
    return stages


def annealed_potential(cost: Tensor, epsilon: float, inverse: Tensor) -> Tensor:
    """Potential on the teacher's side ``(B, M)`` after the annealed loop, in units of the mean cost.

    With GeomLoss' private loop nothing waits for the device; its public solver does.

    Args:
        cost: ``(B, N, M)``.
        epsilon: The ε at which iterations will go on, in units of the mean cost.
        inverse: 1 / mean of each cost, ``(B, 1, 1)``.
    """
    epsilons = annealing(epsilon)
    if sinkhorn_loop is None:
        # It raises if a cost is not finite. That pair gets no plan anyway, and must not stop the others.
        finite = (cost * inverse).nan_to_num_(1.0, 1.0, 1.0)
        return solve_batch(finite, reg=epsilons[-1], max_iter=len(epsilons)).potential_b.to(cost.dtype)
    softmin = ScalingSoftmin(cost, inverse)
    # Left to itself the loop ends with an update of both sides, but only the teacher's is needed.
    student = run_geomloss_loop(cost, epsilons, softmin, last_update=False).f_ba
    return softmin(epsilons[-1], None, "yx", student)


def run_geomloss_loop(
    cost: Tensor,
    epsilons: Sequence[float],
    softmin: Callable[[float, Tensor, object, Tensor], Tensor],
    *,
    last_update: bool = True,
) -> SinkhornPotentials:
    """GeomLoss' loop between uniform masses.

    Args:
        cost: ``(B, N, M)``; only its shape, type and device matter.
        epsilons: ε of each iteration.
        softmin: Is called with ε, log weights, ``"xy"`` (student's side) or ``"yx"`` (teacher's side) in place of the
            cost, and the potential of the other side.
        last_update: Whether the loop ends with a whole update of both sides at the last ε, in place of half of one.
    """
    batch, rows, columns = cost.shape
    return sinkhorn_loop(
        softmin=softmin,
        log_a_list=[cost.new_full((batch, rows), -math.log(rows))],
        log_b_list=[cost.new_full((batch, columns), -math.log(columns))],
        C_list=[CostMatrices(xx=None, yy=None, xy="xy", yx="yx")],
        descent=DescentParameters(
            eps_list=list(epsilons), rho_list=[None] * len(epsilons), scale_list=[0] * len(epsilons)
        ),
        debias=False,
        last_extrapolation=last_update,
    )


class ScalingSoftmin:
    """The softmin that GeomLoss' loop calls, for uniform masses: a matrix-vector product.

    At each ε the loop calls it for the student's side first. That call makes the kernel exp((g - C) / ε) of the
    teacher's potential g, scaled such that the largest entry of each row is 1. The call for the teacher's side takes a
    product with it.

    Args:
        cost: ``(B, N, M)``.
        inverse: Factor of each cost, ``(B, 1, 1)``.
    """

    def __init__(self, cost: Tensor, inverse: Tensor) -> None:
        self.cost, self.inverse = cost, inverse
        self.kernel = cost
        #: The teacher's potential that the kernel has absorbed ``(B, M)``.
        self.absorbed = cost
        #: The logarithm of what each of its rows was divided by ``(B, N)``.
        self.largest = cost

    def __call__(self, epsilon: float, log_weights: object, side: object, potential: Tensor) -> Tensor:
        """-ε log Σ_j exp((g_j - C_ij) / ε) / M for ``side`` "xy"; the same over i with f and N for "yx"."""
        if epsilon == math.inf:
            return self.cost.mean(2 if side == "xy" else 1).mul_(self.inverse.squeeze(2))
        return self._students(epsilon, potential) if side == "xy" else self._teachers(epsilon, potential)

    def _students(self, epsilon: float, potential: Tensor) -> Tensor:
        self.absorbed, self.kernel = potential, self.cost  # frees the old kernel before the new one is made
        exponent = torch.addcmul((potential / epsilon)[:, None], self.cost, self.inverse, value=-1 / epsilon)
        largest = exponent.amax(2, keepdim=True)
        # Without the clamp there are denormal numbers, which slow a CPU down ten times.
        self.kernel = exponent.sub_(largest).clamp_min_(-EXPONENT_LIMIT).exp_()
        self.largest = largest.squeeze(2)
        return self.kernel.mean(2).log_().add_(self.largest).mul_(-epsilon)

    def _teachers(self, epsilon: float, potential: Tensor) -> Tensor:
        # A clamped scaling is corrected when the next kernel is made; an infinite one would spoil the plan.
        scaling = torch.add(self.largest, potential, alpha=1 / epsilon).clamp_(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp_()
        mass = matrix_vector(self.kernel.mT, scaling).div_(scaling.shape[1])
        return torch.sub(self.absorbed, mass.log_(), alpha=epsilon)
