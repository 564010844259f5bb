r"""Entropic transport plans between uniform masses: minimisers of ⟨P, M⟩ + ε KL(P, a bᵀ), by Sinkhorn's algorithm.

A solve without a potential, such as the first one of a pair, starts with GeomLoss' annealed loop (see
:mod:`~lightning_otrt.transport.geomloss_loop`). From its potential, or from that of an earlier solve, alternating
updates go on at the last ε. They converge about twice as fast there as GeomLoss' symmetric ones, and end on the
student's side, whose masses are then exact.

All updates use a kernel with absorbed potentials, the scaling form: an iteration is two matrix-vector products instead
of two passes of exponentials over the cost matrix.

Nothing here is differentiable: a plan is a constant of the backward pass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_otrt.transport.geomloss_loop import EXPONENT_LIMIT, annealed_potential
from lightning_otrt.transport.tensors import matrix_vector, without_autocast

__all__ = ["BLOCK", "TRAINING_ITERATIONS", "EntropicPlan", "sinkhorn_plan", "training_iterations"]

#: Updates of a training step at the last ε, where nothing may wait for the device to report the error: after the
#: annealed loop, and from the potential of an earlier solve, since when the network and the batch have changed.
TRAINING_ITERATIONS = 20
#: The same for at most so many entries of a cost. There an update takes a CPU ten microseconds, and small problems need
#: more of them: with 20, terms of 6 to 8 neurons were up to 27 % below the least cost.
SMALL_ENTRIES, SMALL_ITERATIONS = 64 * 64, 100
#: Updates between two absorptions of the potentials. Each absorption costs a pass of exponentials over the cost matrix.
#: In between, entries of the kernel that are below e^-40 of the largest one in their row stay at that floor.
BLOCK = 20
#: Marginal error (L1, of a total mass of 1) at which the iterations stop, and the one above which they have failed.
TOLERANCE = 1e-3
FAILURE = 1e-2
MAX_ITERATIONS = 5_000
#: Masses that no sum of masses in float32 can show.
NEGLIGIBLE = 1e-30


class EntropicPlan(NamedTuple):
    """Entropic plans of a batch, with what the next solve starts from.

    Attributes:
        matrix: ``(B, N, M)``; rows sum to 1/N exactly.
        potential: Potential g on the teacher's side ``(B, M)``, in units of the mean cost.
        teacher_mass: Column sums ``(B, M)``.
        marginal_error: L1 distance of the column sums to 1/M, ``(B,)``.
    """

    matrix: Tensor
    potential: Tensor
    teacher_mass: Tensor
    marginal_error: Tensor


def training_iterations(rows: int, columns: int) -> int:
    """Updates of a training step for costs of this size."""
    return SMALL_ITERATIONS if rows * columns <= SMALL_ENTRIES else TRAINING_ITERATIONS


def sinkhorn_plan(
    cost: Tensor,
    epsilon: float,
    *,
    potential: Tensor | None = None,
    iterations: int | None = None,
    mean: Tensor | None = None,
) -> EntropicPlan:
    """Entropic plans of a batch of costs.

    Args:
        cost: ``(B, N, M)``, finite, non-negative, float32 or float64.
        epsilon: Regularisation relative to the mean of each cost matrix.
        potential: Potential of an earlier solve ``(B, M)`` to start from, instead of GeomLoss' annealed loop.
        iterations: Alternating updates at the last ε, without any wait for the device. None iterates until the marginal
            error is below 1e-3.
        mean: Mean of each cost ``(B,)``, if it is known.

    Raises:
        RuntimeError: With ``iterations=None``, if the marginal error stays above 1e-2.

    Example:
        >>> cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> sinkhorn_plan(cost, 0.1).matrix.round(decimals=3)
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.5000]]])
    """
    with torch.no_grad(), without_autocast(cost):
        mean = (cost.mean((1, 2)) if mean is None else mean)[:, None, None]
        inverse = torch.where(mean > 0, mean, 1.0).reciprocal_()
        if potential is None:
            potential = annealed_potential(cost, epsilon, inverse)
        if iterations is None:
            return _converge(cost, potential, epsilon, inverse)
        return _alternate(cost, _raise_unreachable(cost, potential, epsilon, inverse), epsilon, iterations, inverse)


def _converge(cost: Tensor, potential: Tensor, epsilon: float, inverse: Tensor) -> EntropicPlan:
    """Alternating updates until the marginal error is below the tolerance; each block waits for the device."""
    # Where the error is NaN, each `not error <= ...` holds.
    spent = 0
    while True:
        start = _raise_unreachable(cost, potential, epsilon, inverse)
        result = _alternate(cost, start, epsilon, BLOCK, inverse)
        spent += BLOCK
        error = result.marginal_error.max().item()
        if error <= TOLERANCE or spent >= MAX_ITERATIONS:
            break
        potential = result.potential
    # The floor of the kernel can hold up masses that the true plan does not have. Without it the error shows them.
    result = _without_floor(cost, result.potential, epsilon, inverse)
    error = result.marginal_error.max().item()
    while not error <= TOLERANCE and spent < MAX_ITERATIONS:
        potential = _logarithmic_updates(cost, result.potential, epsilon, BLOCK, inverse)
        result = _without_floor(cost, potential, epsilon, inverse)
        spent += BLOCK
        error = result.marginal_error.max().item()
    if not error <= FAILURE:
        raise RuntimeError(
            f"The transport plan for a cost of shape {tuple(cost.shape[1:])} did not converge: after {spent} "
            f"iterations its marginal error is {error:.2g} (at most {FAILURE:g} is accepted) at "
            f"epsilon={epsilon:g} of the mean cost, with costs between {cost.min():.3g} and {cost.max():.3g}. "
            'Use a larger `epsilon` or `plan="exact"`.'
        )
    return result


def _raise_unreachable(cost: Tensor, potential: Tensor, epsilon: float, inverse: Tensor) -> Tensor:
    """The potential, raised for each column that is out of reach of every row, until one row reaches it.

    Otherwise all entries of such a column are the floor of the kernel. The updates then fill the column from all rows
    evenly: a false fixed point, whose marginals are right although it is no plan. No converged plan has a column that
    would be raised.
    """
    slack = torch.addcmul(potential[:, None], cost, -inverse)
    nearest = slack.sub_(slack.amax(2, keepdim=True)).amax(1)
    return potential - nearest.add_(EXPONENT_LIMIT / 2 * epsilon).clamp_max_(0)


def _without_floor(cost: Tensor, potential: Tensor, epsilon: float, inverse: Tensor) -> EntropicPlan:
    """The plan of a potential after an update of the rows, with every entry as small as it is; 0 if negligible."""
    rows, columns = cost.shape[1:]
    matrix = torch.softmax(torch.addcmul((potential / epsilon)[:, None], cost, inverse / -epsilon), 2).div_(rows)
    # Products with denormal numbers take a CPU up to thirty times as long.
    matrix = torch.threshold_(matrix, NEGLIGIBLE, 0.0)
    teacher_mass = matrix.sum(1)
    return EntropicPlan(matrix, potential, teacher_mass, (teacher_mass - 1 / columns).abs_().sum(1))


def _logarithmic_updates(cost: Tensor, potential: Tensor, epsilon: float, iterations: int, inverse: Tensor) -> Tensor:
    """The potential after alternating updates of logarithms: slow, but correct for any range of costs."""
    rows, columns = cost.shape[1:]
    scaled = cost * (inverse / -epsilon)
    potential = potential / epsilon
    for _ in range(iterations):
        own = torch.logsumexp(scaled + potential[:, None], 2, keepdim=True)
        potential = math.log(rows / columns) - torch.logsumexp(scaled - own, 1)
    return potential * epsilon


def _alternate(cost: Tensor, potential: Tensor, epsilon: float, iterations: int, inverse: Tensor) -> EntropicPlan:
    """The plan after alternating updates of the two potentials; ``inverse`` ``(B, 1, 1)`` is 1 / mean of the costs."""
    rows, columns = cost.shape[1:]
    while iterations > BLOCK:
        potential = _absorb(potential, _updates(cost, potential, epsilon, BLOCK, inverse)[1], epsilon)
        iterations -= BLOCK
    kernel, v = _updates(cost, potential, epsilon, iterations, inverse)
    potential = _absorb(potential, v, epsilon)
    u = matrix_vector(kernel, v).reciprocal_().div_(rows)
    matrix = kernel.mul_(u[..., None]).mul_(v[:, None])
    teacher_mass = matrix.sum(1)
    return EntropicPlan(matrix, potential, teacher_mass, (teacher_mass - 1 / columns).abs_().sum(1))


def _updates(
    cost: Tensor, potential: Tensor, epsilon: float, iterations: int, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """A kernel around ``potential``, and the scaling v of its columns ``(B, M)`` after updates of both sides."""
    kernel = torch.softmax(torch.addcmul((potential / epsilon)[:, None], cost, inverse / -epsilon), 2)
    # The floor keeps every column within reach, and products off denormal numbers, which slow a CPU down ten times.
    kernel = kernel.clamp_min_(math.exp(-EXPONENT_LIMIT))
    # The softmax is the first update of the rows; constant factors of u and v cancel.
    v = kernel.sum(1).reciprocal_()
    # Both sides sum to the same mass, the number of rows. Else v would grow by M / N in each update, and overflow.
    # A number that a kernel takes as an argument: nothing is copied to a device.
    share = torch.full((), cost.shape[1] / cost.shape[2], dtype=cost.dtype, device="cpu")
    # A batch of one as a matrix and vectors: `mv` takes half the time of `bmm`, and views as much as a small product.
    multiply, left, v = (torch.mv, kernel[0], v[0]) if len(kernel) == 1 else (torch.bmm, kernel, v[..., None])
    right = left.mT
    for _ in range(iterations - 1):
        u = multiply(left, v).reciprocal_()
        v = multiply(right, u)
        torch.div(share, v, out=v)
    return kernel, v.view(cost.shape[0], cost.shape[2])


def _absorb(potential: Tensor, v: Tensor, epsilon: float) -> Tensor:
    """The potential with the scaling ``v`` of the columns in it."""
    step = v.log()
    # Potentials are known up to a constant, which the update of the rows absorbs. Centred they stay of order one.
    return torch.add(potential, step - step.mean(1, keepdim=True), alpha=epsilon)
