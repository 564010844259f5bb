"""GeomLoss' annealed Sinkhorn loop on our own softmin. The only file that imports GeomLoss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from geomloss.ot import solve_batch
from torch import Tensor

try:
    # A private module: the loop takes a softmin of our own. If a release of GeomLoss moves it, the public solver is
    # used instead.
    from geomloss._typing import CostMatrices, DescentParameters, SinkhornPotentials
    from geomloss.ot._abstract_solvers.sinkhorn_ot import sinkhorn_loop
except ImportError:  # pragma: no cover - only with a GeomLoss that the contract test has not seen
    sinkhorn_loop = None

__all__ = ["ScalingSoftmin", "annealed_potential", "run_geomloss_loop"]

_TINY = 1e-30
_RANGE = 40.0


def annealed_potential(cost: Tensor, epsilons: Sequence[float]) -> Tensor:
    """Teacher-side potential after GeomLoss' symmetric loop over ``epsilons``; ``cost`` has a mean of 1."""
    if sinkhorn_loop is None:
        return solve_batch(cost, reg=epsilons[-1], max_iter=len(epsilons)).potential_b.to(cost.dtype)
    return run_geomloss_loop(cost, epsilons, ScalingSoftmin(cost)).g_ab


def run_geomloss_loop(
    cost: Tensor, epsilons: Sequence[float], softmin: Callable[[float, Tensor, object, Tensor], Tensor]
) -> SinkhornPotentials:
    """GeomLoss' loop on uniform masses; ``softmin`` is asked with the costs ``"xy"`` and ``"yx"``."""
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
        last_extrapolation=True,
    )


class ScalingSoftmin:
    """The softmin that GeomLoss' loop asks for, as a matrix-vector product on a kernel with absorbed potentials.

    At each new ε the loop asks for the student's side first: the kernel is rebuilt there from the teacher's potential,
    with rows whose largest entry is 1. Until the next ε only the change of the potentials is exponentiated.
    """

    def __init__(self, cost: Tensor) -> None:
        self.cost = cost
        self.epsilon = math.nan
        self.kernel = self.f = self.g = cost

    def __call__(self, epsilon: float, log_weights: Tensor, side: object, potential: Tensor) -> Tensor:
        """-ε log Σ_j exp(log b_j + (g_j - C_ij) / ε), for ``side`` "xy"; the same over i for "yx"."""
        if epsilon == math.inf:
            return self.cost.mean(2 if side == "xy" else 1)
        if epsilon != self.epsilon:
            self.epsilon, self.g = epsilon, potential
            self.kernel, top = _kernel_and_top(self.cost, potential, epsilon)
            self.f = top.squeeze(2).mul_(-epsilon)
        own, other = (self.f, self.g) if side == "xy" else (self.g, self.f)
        kernel = self.kernel if side == "xy" else self.kernel.mT
        # Clamped, a scaling that has run too far is taken up by the next rebuild; unclamped it would end the plan.
        scaling = (potential - other).div_(epsilon).add_(log_weights).clamp_(-_RANGE, _RANGE).exp_()
        mass = (kernel @ scaling[..., None]).squeeze(-1).clamp_min_(_TINY)
        return torch.sub(own, mass.log_(), alpha=epsilon)


def _kernel_and_top(cost: Tensor, potential: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """exp((f_i + g_j - C_ij) / ε) with f such that the largest entry of each row is 1: no row can underflow."""
    exponent = torch.sub(potential[:, None, :], cost).div_(epsilon)
    top = exponent.amax(2, keepdim=True)
    # Without the clamp the products are denormal numbers, which cost a CPU ten times the time of others.
    return exponent.sub_(top).clamp_min_(-_RANGE).exp_(), top
