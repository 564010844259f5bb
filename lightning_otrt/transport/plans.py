r"""From a cost matrix to a transport plan between uniform masses.

Entropic plans minimise ⟨P, M⟩ + ε KL(P, a bᵀ). Everything iterates on a kernel with absorbed potentials, the scaling
form: an iteration is two matrix-vector products instead of two passes of exponentials over the cost matrix. Alternating
updates at the last ε converge about twice as fast as symmetric ones, and end on the student's side, whose masses are
exact. What comes before them: GeomLoss' symmetric loop, which anneals ε from a large value, for plans that have to
converge; a short staircase of alternating updates, at a third of the price, for the few iterations of a training step.

Nothing here is differentiable: a plan is a constant of the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from geomloss.ot import solve_batch
from torch import Tensor

try:
    # The loop takes a softmin of our own; a release of GeomLoss that moves it is served by the public solver instead.
    from geomloss._typing import CostMatrices, DescentParameters, SinkhornPotentials
    from geomloss.ot._abstract_solvers.sinkhorn_ot import sinkhorn_loop
except ImportError:  # pragma: no cover - only with a GeomLoss that the contract test has not seen
    sinkhorn_loop = None

__all__ = [
    "ANNEALING",
    "Diagnostics",
    "EntropicPlan",
    "diagnose",
    "exact_plan",
    "identity_plan",
    "random_plan",
    "sinkhorn_plan",
    "uniform_plan",
]

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
            potential = _anneal(cost * inverse, [max(step, epsilon) for step in ANNEALING])
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


def _kernel_and_top(cost: Tensor, potential: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """exp((f_i + g_j - C_ij) / ε) with f such that the largest entry of each row is 1: no row can underflow."""
    exponent = torch.sub(potential[:, None, :], cost).div_(epsilon)
    top = exponent.amax(2, keepdim=True)
    # Without the clamp the products are denormal numbers, which cost a CPU ten times the time of others.
    return exponent.sub_(top).clamp_min_(-_RANGE).exp_(), top


def _anneal(cost: Tensor, epsilons: Sequence[float]) -> Tensor:
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


def exact_plan(cost: Tensor) -> Tensor:
    """Optimal plans of ``(B, N, M)`` without regularisation, on the CPU.

    Equal widths are an assignment (scipy); others need POT's network simplex, ``pip install POT``.

    Raises:
        ModuleNotFoundError: If the widths differ and POT is not installed.
    """
    _, rows, columns = cost.shape
    costs = cost.detach().double().cpu().numpy()
    if rows == columns:
        from scipy.optimize import linear_sum_assignment

        matrix = torch.zeros(cost.shape, dtype=cost.dtype)
        for plan, problem in zip(matrix, costs, strict=True):
            plan[linear_sum_assignment(problem)] = 1 / rows
        return matrix.to(cost.device)
    try:
        from ot import emd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'plan="exact" between {rows} student and {columns} teacher neurons needs POT, because the widths differ: '
            "pip install lightning_otrt[exact]."
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


class Diagnostics(NamedTuple):
    """What a plan looks like; each is ``(...)`` for plans ``(..., N, M)``.

    Attributes:
        student_error: L1 distance of the row sums to 1/N, of a total mass of 1.
        teacher_error: L1 distance of the column sums to 1/M.
        entropy: Entropy of the plan over that of the uniform plan: 1 matches nothing; an assignment of N = M neurons
            has 1/2.
        off_identity: Share of the mass off the diagonal, for equal widths: how many neurons were reallocated. NaN
            otherwise.
    """

    student_error: Tensor
    teacher_error: Tensor
    entropy: Tensor
    off_identity: Tensor


def diagnose(plan: Tensor) -> Diagnostics:
    """Diagnostics of plans ``(..., N, M)``.

    Example:
        >>> import torch
        >>> from lightning_otrt.transport.plans import diagnose
        >>> round(diagnose(torch.eye(4) / 4).entropy.item(), 3)
        0.5
    """
    rows, columns = plan.shape[-2:]
    total = plan.sum((-2, -1))
    diagonal = plan.diagonal(dim1=-2, dim2=-1).sum(-1)
    return Diagnostics(
        student_error=(plan.sum(-1) - 1 / rows).abs().sum(-1),
        teacher_error=(plan.sum(-2) - 1 / columns).abs().sum(-1),
        entropy=torch.special.entr(plan).sum((-2, -1)) / max(math.log(rows * columns), _TINY),
        off_identity=1 - diagonal / total if rows == columns else torch.full_like(total, math.nan),
    )
