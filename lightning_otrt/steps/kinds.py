"""From the name of a kind of plan to its coupling."""

from __future__ import annotations

from lightning_otrt.steps.coupling import Coupling
from lightning_otrt.steps.entropic_coupling import EntropicCoupling, StaticCoupling
from lightning_otrt.steps.exact_coupling import ExactCoupling
from lightning_otrt.steps.fixed_coupling import FixedCoupling
from lightning_otrt.steps.orthogonal_coupling import OrthogonalCoupling, RandomOrthogonalCoupling
from lightning_otrt.steps.settings import TermSettings

__all__ = ["get_coupling"]


def get_coupling(plan: str, settings: TermSettings) -> Coupling:
    """The coupling for a kind of plan.

    Args:
        plan: One of :data:`lightning_otrt.transport.plans.PLANS`, which that of the settings is not if it is "auto".
        settings: The settings of the term.
    """
    cost, memory, solve_every = settings.cost, settings.memory, settings.solve_every
    if plan == "orthogonal":
        return OrthogonalCoupling(cost, memory, solve_every)
    if plan == "random_orthogonal":
        return RandomOrthogonalCoupling(cost, memory, solve_every, settings.seed)
    if plan == "sinkhorn":
        return EntropicCoupling(cost, settings.epsilon, memory, solve_every)
    if plan == "static":
        return StaticCoupling(cost, settings.epsilon)
    if plan == "exact":
        return ExactCoupling(cost, memory, solve_every)
    return FixedCoupling(cost, plan, settings.seed)
