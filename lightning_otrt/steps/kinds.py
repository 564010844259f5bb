"""From the name of a kind of plan to its coupling."""

from __future__ import annotations

from lightning_otrt.steps.coupling import Coupling, EntropicCoupling, ExactCoupling, FixedCoupling, StaticCoupling
from lightning_otrt.steps.orthogonal_coupling import OrthogonalCoupling, RandomOrthogonalCoupling
from lightning_otrt.transport.cost import Cost

__all__ = ["get_coupling"]


def get_coupling(
    plan: str, cost: Cost, *, epsilon: float, memory: float | str, solve_every: int, seed: int
) -> Coupling:
    """The coupling for a kind of plan.

    Args:
        plan: One of :data:`lightning_otrt.transport.plans.PLANS`.
        cost: The ground cost.
        epsilon: Entropic regularisation relative to the mean cost.
        memory: Decay of the running cost, or ``"auto"``.
        solve_every: Calls between two solves.
        seed: Seed of random plans and projections.
    """
    if plan == "orthogonal":
        return OrthogonalCoupling(cost, memory, solve_every)
    if plan == "random_orthogonal":
        return RandomOrthogonalCoupling(cost, memory, solve_every, seed)
    if plan == "sinkhorn":
        return EntropicCoupling(cost, epsilon, memory, solve_every)
    if plan == "static":
        return StaticCoupling(cost, epsilon)
    if plan == "exact":
        return ExactCoupling(cost, memory, solve_every)
    return FixedCoupling(cost, plan, seed)
