"""Kinds of transport plan by name: entropic, exact, and the controls that do not look at the cost.

All plans couple uniform masses, and are constants of the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from lightning_otrt.checks import shown
from lightning_otrt.random_numbers import random_numbers_restored
from lightning_otrt.transport.correlation import CorrelationCost, CovarianceCost
from lightning_otrt.transport.cost import Cost
from lightning_otrt.transport.sinkhorn import sinkhorn_plan

__all__ = [
    "CONTROLS",
    "ONE_BATCH_PLANS",
    "ORTHOGONAL",
    "PLANS",
    "check_epsilon",
    "check_plan",
    "check_plan_and_cost",
    "exact_plan",
    "fixed_plan",
    "identity_plan",
    "random_plan",
    "solve_plan",
    "uniform_plan",
]

#: Plans that follow from the widths alone.
CONTROLS = ("identity", "uniform", "random")
#: Couplings by a rotation in place of a transport plan: the best one, and its control, a fixed random one.
ORTHOGONAL = ("orthogonal", "random_orthogonal")
#: Plans of one batch of observations.
ONE_BATCH_PLANS = ("sinkhorn", "exact", *CONTROLS, *ORTHOGONAL)
#: All kinds of plan. Two exist in a training run only: "static", a Sinkhorn plan that is solved once and kept, and
#: "auto", which is "sinkhorn" or "orthogonal" pair by pair.
PLANS = (*ONE_BATCH_PLANS, "static", "auto")


def check_plan(plan: str, allowed: Sequence[str] = PLANS) -> None:
    """Raise a ValueError unless ``plan`` is one of ``allowed``."""
    if plan not in allowed:
        raise ValueError(f"Expected argument `plan` to be one of {list(allowed)}, but got {shown(plan)}.")


def check_plan_and_cost(plan: str, cost: Cost) -> None:
    """Raise a ValueError if a kind of plan and a cost do not go together."""
    if plan == "auto" and type(cost) is not CorrelationCost:
        raise ValueError(
            f'plan="auto" cannot be combined with cost={cost.name!r}: it may choose an orthogonal plan, which needs '
            'correlations. Pass cost="correlation", or name the plan.'
        )
    if plan in ORTHOGONAL and not isinstance(cost, CorrelationCost):
        raise ValueError(
            f"plan={plan!r} cannot be combined with cost={cost.name!r}: its targets are rotations of the teacher's "
            'neurons, which follow from correlations and not from a cost. Pass cost="correlation", which standardises '
            'neurons, cost="covariance", which leaves them their scale, or plan="sinkhorn" with this cost.'
        )
    if plan not in ORTHOGONAL and isinstance(cost, CovarianceCost):
        raise ValueError(
            f'cost="covariance" cannot be combined with plan={plan!r}: it says how neurons enter an orthogonal '
            'coupling, and is no cost between two neurons. Pass cost="correlation", or plan="orthogonal".'
        )


def check_epsilon(epsilon: float) -> None:
    """Raise a ValueError unless ``epsilon`` is a number between 0 and 1."""
    if not (isinstance(epsilon, Real) and math.isfinite(epsilon) and 0 < epsilon < 1):
        raise ValueError(
            f"Expected argument `epsilon` to lie between 0 and 1, but got {shown(epsilon)}. It is relative to the mean "
            "cost: 0.01 is close to an exact plan, from 0.2 on nothing is matched, at 1 the plan is uniform."
        )


def solve_plan(matrix: Tensor, plan: str, epsilon: float, seed: int) -> Tensor:
    """Plans of a kind for costs ``(B, N, M)``, converged.

    Raises:
        RuntimeError: If an entropic plan does not converge.
    """
    coupling = fixed_plan(plan, *matrix.shape[1:], seed=seed)
    if coupling is not None:
        return coupling.to(matrix).expand_as(matrix)
    return exact_plan(matrix) if plan == "exact" else sinkhorn_plan(matrix, epsilon).matrix


def fixed_plan(plan: str, rows: int, columns: int, *, seed: int, where: str = "the pair") -> Tensor | None:
    """The plan of a control that does not look at the cost, ``(N, M)``, or None for a plan that must be solved."""
    if plan == "identity":
        return identity_plan(rows, columns, where)
    if plan == "uniform":
        return uniform_plan(rows, columns)
    if plan == "random":
        return random_plan(rows, columns, seed)
    return None


def exact_plan(cost: Tensor) -> Tensor:
    """Optimal plans of ``(B, N, M)`` without regularisation, on the CPU.

    Equal widths are an assignment (scipy); others need POT's network simplex, ``pip install POT``.

    Raises:
        ModuleNotFoundError: If the widths differ and POT is not installed.
    """
    _, rows, columns = cost.shape
    costs = cost.detach().cpu().double().numpy()
    if rows == columns:
        from scipy.optimize import linear_sum_assignment

        matrix = torch.zeros(cost.shape, dtype=cost.dtype)
        for plan, problem in zip(matrix, costs, strict=True):
            plan[linear_sum_assignment(problem)] = 1 / rows
        return matrix.to(cost.device)
    try:
        with random_numbers_restored():  # POT draws from NumPy's generator when it is imported
            from ot import emd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'plan="exact" between {rows} student and {columns} teacher neurons needs POT, because the widths differ: '
            "pip install POT."
        ) from error
    # POT compares reduced costs with an absolute tolerance: in units of its own mean no cost is too small for it.
    scales = [problem.mean() or 1.0 for problem in costs]
    plans = [
        torch.from_numpy(emd([], [], problem / scale, numItermax=1_000_000))
        for problem, scale in zip(costs, scales, strict=True)
    ]
    return torch.stack(plans).to(cost.device, cost.dtype)


def identity_plan(rows: int, columns: int, where: str = "the pair") -> Tensor:
    """Neuron i to neuron i, ``(N, N)``: the control without any matching.

    Raises:
        ValueError: If the widths differ.
    """
    if rows != columns:
        raise ValueError(
            f'plan="identity" needs equal widths, but {where} has {rows} student and {columns} teacher neurons. '
            'Use plan="sinkhorn", or plan="random" as a control.'
        )
    return torch.eye(rows) / rows


def uniform_plan(rows: int, columns: int) -> Tensor:
    """Every neuron to every neuron, ``(N, M)``: the control that matches nothing."""
    return torch.full((rows, columns), 1 / (rows * columns))


def random_plan(rows: int, columns: int, seed: int) -> Tensor:
    """A balanced assignment drawn once, ``(N, M)``: the control that tells whether the matching matters.

    Neurons of both sides are put in random order and filled up to their masses one after the other (the north-west
    corner rule), so that the masses are exact and as few neurons as possible are split.
    """
    generator = torch.Generator().manual_seed(seed)
    edges = [torch.arange(size + 1, dtype=torch.float64) / size for size in (rows, columns)]
    lower = torch.maximum(edges[0][:-1, None], edges[1][None, :-1])
    upper = torch.minimum(edges[0][1:, None], edges[1][None, 1:])
    plan = (upper - lower).clamp_min(0).float()
    return plan[torch.randperm(rows, generator=generator)][:, torch.randperm(columns, generator=generator)]
