r"""Entropic transport plans between uniform masses: the minimisers of ⟨P, M⟩ + ε KL(P, a bᵀ), by Sinkhorn's algorithm.

Everything iterates on a kernel with absorbed potentials, the scaling form: an iteration is two matrix-vector products
instead of two passes of exponentials over the cost matrix.

Nothing here is differentiable: a plan is a constant of the backward pass.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_otrt.transport.geomloss_loop import annealed_potential

__all__ = ["EntropicPlan", "sinkhorn_plan"]

#: ε of GeomLoss' annealing iterations in units of the mean cost, since each new ε costs a pass of exponentials.
ANNEALING: tuple[float, ...] = (0.3, 0.3, 0.06, 0.06, 0.06, 0.06)
#: The staircase of a training step, as (multiple of the last ε, updates), and its updates at the last ε, where nothing
#: may wait for the device to report the error.
STAIRCASE: tuple[tuple[int, int], ...] = ((20, 2), (5, 3))
TRAINING_ITERATIONS = 8
#: The same where a solve starts from the potential of an earlier one, which the network and the batch have left behind.
WARM_ITERATIONS = 20
#: Iterations between two absorptions of the potentials; float32 scalings overflow after many more.
BLOCK = 10
#: Marginal error (L1, of a total mass of 1) at which the iterations stop, and the one above which they have failed.
TOLERANCE = 1e-3
FAILURE = 1e-2
MAX_ITERATIONS = 5_000
_TINY = 1e-30
#: Exponents beyond which scalings and kernels are cut: e^±40 squared stays within float32.
_RANGE = 40.0


class EntropicPlan(NamedTuple):
    """An entropic plan with what the next solve starts from.

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
        potential: Potential of an earlier solve ``(B, M)`` to start from. It is better than any larger ε before: those
            undo what it knows.
        iterations: Alternating updates at the last ε, without any wait for the device. None iterates until the marginal
            error is below 1e-3.
        mean: Mean of each cost ``(B,)``, where it is known.

    Raises:
        RuntimeError: With ``iterations=None``, if the marginal error stays above 1e-2.
    """
    with torch.no_grad(), torch.autocast(cost.device.type, enabled=False):
        mean = (cost.mean((1, 2)) if mean is None else mean)[:, None, None]
        inverse = 1 / torch.where(mean > 0, mean, 1.0)
        if iterations is not None:
            if potential is None:
                # From here every column is within reach of the row that is nearest to it.
                potential = cost.amin(1).mul_(inverse.squeeze(2))
                for multiple, count in STAIRCASE:
                    potential = _potential(cost, potential, multiple * epsilon, count, inverse)
            else:
                potential = _reach(cost, potential, epsilon, inverse)
            return _alternate(cost, potential, epsilon, iterations, inverse)
        if potential is None:
            potential = annealed_potential(cost * inverse, [max(step, epsilon) for step in ANNEALING])
        spent = 0
        while True:
            result = _alternate(cost, _reach(cost, potential, epsilon, inverse), epsilon, BLOCK, inverse)
            spent += BLOCK
            error = result.marginal_error.max().item()
            if error <= TOLERANCE or not spent < MAX_ITERATIONS:
                break
            potential = result.potential
        # What the floor of the kernel holds up is no plan: without it the columns tell.
        result = _without_floor(cost, result.potential, epsilon, inverse)
        error = result.marginal_error.max().item()
        while not error <= TOLERANCE and spent < MAX_ITERATIONS:
            potential = _logarithmic(cost, result.potential, epsilon, BLOCK, inverse)
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


def _reach(cost: Tensor, potential: Tensor, epsilon: float, inverse: Tensor) -> Tensor:
    """The potential, raised where a column is out of reach of every row, up to where it is not.

    Else all entries of such a column are the floor of the kernel, which the updates fill from all rows alike, with
    marginals as right as they are meaningless. No converged plan has a column that would be raised.
    """
    slack = torch.addcmul(potential[:, None], cost, -inverse)
    nearest = slack.sub_(slack.amax(2, keepdim=True)).amax(1)
    return potential - nearest.add_(_RANGE / 2 * epsilon).clamp_max_(0)


def _without_floor(cost: Tensor, potential: Tensor, epsilon: float, inverse: Tensor) -> EntropicPlan:
    """The plan of a potential after an update of the rows, with every entry as small as it is."""
    rows, columns = cost.shape[1:]
    matrix = torch.softmax(torch.addcmul((potential / epsilon)[:, None], cost, inverse / -epsilon), 2).div_(rows)
    teacher_mass = matrix.sum(1)
    return EntropicPlan(matrix, potential, teacher_mass, (teacher_mass - 1 / columns).abs_().sum(1))


def _logarithmic(cost: Tensor, potential: Tensor, epsilon: float, iterations: int, inverse: Tensor) -> Tensor:
    """The potential after alternating updates of logarithms: slow, and right whatever the costs span."""
    rows, columns = cost.shape[1:]
    scaled = cost * (inverse / -epsilon)
    potential = potential / epsilon
    for _ in range(iterations):
        own = torch.logsumexp(scaled + potential[:, None], 2, keepdim=True)
        potential = math.log(rows / columns) - torch.logsumexp(scaled - own, 1)
    return potential * epsilon


def _alternate(cost: Tensor, potential: Tensor, epsilon: float, iterations: int, inverse: Tensor) -> EntropicPlan:
    """Alternating updates of the two potentials; ``inverse`` ``(B, 1, 1)`` is 1 / mean of the costs."""
    rows, columns = cost.shape[1:]
    while iterations > BLOCK:
        potential = _potential(cost, potential, epsilon, BLOCK, inverse)
        iterations -= BLOCK
    kernel, v = _updates(cost, potential, epsilon, iterations, inverse)
    potential = _absorb(potential, v, epsilon)
    u = _times(kernel, v).reciprocal_().div_(rows)
    teacher_mass = torch.bmm(kernel.mT, u).mul_(v).squeeze(2)
    matrix = kernel.mul_(u).mul_(v.mT)
    return EntropicPlan(matrix, potential, teacher_mass, (teacher_mass - 1 / columns).abs_().sum(1))


def _potential(cost: Tensor, potential: Tensor, epsilon: float, iterations: int, inverse: Tensor) -> Tensor:
    """The potential after alternating updates, without its plan."""
    return _absorb(potential, _updates(cost, potential, epsilon, iterations, inverse)[1], epsilon)


def _updates(
    cost: Tensor, potential: Tensor, epsilon: float, iterations: int, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """A kernel around ``potential`` and the scaling v of its columns ``(B, M, 1)`` after some updates of both sides."""
    kernel = torch.softmax(torch.addcmul((potential / epsilon)[:, None], cost, inverse / -epsilon), 2)
    # The floor keeps every column within reach, and products off denormal numbers, which are slow on a CPU.
    kernel = kernel.clamp_min_(math.exp(-_RANGE))
    # The softmax is the first update of the rows; constant factors of u and v cancel.
    v = kernel.sum(1).reciprocal_()[..., None]
    for _ in range(iterations - 1):
        u = _times(kernel, v).reciprocal_()
        v = torch.bmm(kernel.mT, u).clamp_min_(_TINY).reciprocal_()
    return kernel, v


def _times(kernel: Tensor, v: Tensor) -> Tensor:
    """``kernel @ v``; for a batch of one ``mv`` takes half as long as ``bmm``."""
    return kernel[0].mv(v[0, :, 0])[None, :, None] if kernel.shape[0] == 1 else torch.bmm(kernel, v)


def _absorb(potential: Tensor, v: Tensor, epsilon: float) -> Tensor:
    step = v.squeeze(2).log()
    # The potentials are known up to a constant, which the row update absorbs; centred they stay of order one.
    return torch.add(potential, step - step.mean(1, keepdim=True), alpha=epsilon)
