"""The settings of the transport term, which are the same for all pairs of a run."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_otrt.transport.cost import Cost

__all__ = ["TermSettings"]


@dataclass(frozen=True)
class TermSettings:
    """The settings of the transport term.

    Attributes:
        cost: The ground cost.
        plan: Kind of plan; see :data:`lightning_otrt.transport.plans.PLANS`.
        epsilon: Entropic regularisation relative to the mean cost.
        memory: Decay of the running cost, or ``"auto"``: 0.98 where a call has fewer samples than neurons, else 0.
        solve_every: Calls between two solves.
        seed: Seed of random plans and projections.
        strict: Raise on the first call if there are too few observations; else the pair is skipped.
    """

    cost: Cost
    plan: str = "sinkhorn"
    epsilon: float = 0.01
    memory: float | str = 0.0
    solve_every: int = 10
    seed: int = 0
    strict: bool = True
