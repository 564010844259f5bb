"""The transport distance between two sets of neurons: cost, plan, value and gradient put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_otrt.transport.cost import Cost, Plan, Rounds, Sums, ValueAndGradient
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.plans import (
    diagnose,
    exact_plan,
    identity_plan,
    random_plan,
    sinkhorn_plan,
    uniform_plan,
)

__all__ = [
    "PLANS",
    "TransportResult",
    "check_cost",
    "check_epsilon",
    "check_plan",
    "check_values",
    "fixed_plan",
    "solve_plan",
    "transport_distance",
]

#: The kinds of plan; "static" is only known to a training run, where it is a Sinkhorn plan that is kept.
PLANS = ("sinkhorn", "exact", "identity", "uniform", "random", "static")


@dataclass(frozen=True, eq=False)
class TransportResult:
    """A transport distance with the plan behind it.

    Attributes:
        value: ⟨P, M⟩, a scalar or ``(B,)``; differentiable with respect to the student neurons.
        plan: P, ``(N, M)`` or ``(B, N, M)``; a constant.
        cost: M, of the same shape; a constant.
        marginal_error: L1 distance of the teacher's masses to 1/M, of a total mass of 1. The student's are exact up to
            rounding for the plans solved here.
        student_marginal_error: The same on the student's side.
        entropy: Entropy of the plan over that of the uniform plan: 1 matches nothing.
        off_identity: Share of the mass off the diagonal for equal widths, else NaN.

    Example:
        >>> import torch
        >>> from lightning_otrt import transport_distance
        >>> teacher = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
        >>> result = transport_distance(teacher[[1, 0, 2, 3]], teacher, plan="exact")
        >>> result.plan.argmax(1), round(result.off_identity.item(), 2)
        (tensor([1, 0, 2, 3]), 0.5)
    """

    value: Tensor
    plan: Tensor
    cost: Tensor
    marginal_error: Tensor
    student_marginal_error: Tensor
    entropy: Tensor
    off_identity: Tensor

    @classmethod
    def of(cls, value: Tensor, plan: Tensor, cost: Tensor) -> TransportResult:
        """A value with its plan, its cost and the diagnostics that follow from them."""
        numbers = diagnose(plan)
        return cls(
            value=value,
            plan=plan,
            cost=cost,
            marginal_error=numbers.teacher_error,
            student_marginal_error=numbers.student_error,
            entropy=numbers.entropy,
            off_identity=numbers.off_identity,
        )


def transport_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    cost: str | Callable[[Tensor, Tensor], Tensor] = "correlation",
    plan: str = "sinkhorn",
    epsilon: float = 0.01,
    seed: int = 0,
) -> TransportResult:
    r"""Optimal transport distance between the neurons of a student and those of a teacher.

    .. math:: \Omega(T, S) = \langle P^*, M\rangle = \min_{P \in \Pi(a, b)} \sum_{ij} P_{ij} M_{ij}

    with uniform masses (arXiv 2007.06737, equation 2). The plan is a constant of the backward pass (envelope theorem);
    the gradient flows to ``student`` alone, and is that of ⟨P, M⟩ with P held fixed.

    Args:
        student: Student neurons, ``(N, n)`` or ``(B, N, n)``: rows are neurons, columns observations.
        teacher: Teacher neurons, ``(M, n)`` or ``(B, M, n)``, over the same observations. A constant.
        cost: ``"correlation"`` (1 - r), ``"euclidean"``, ``"sqeuclidean"`` (both in units of the teacher's root mean
            square activation and per observation) or a function of the raw neurons, in float32 or wider, that gives the
            ``(N, M)`` costs.
        plan: ``"sinkhorn"`` (entropic), ``"exact"``, or a control: ``"identity"``, ``"uniform"``, ``"random"``.
        epsilon: Entropic regularisation, relative to the mean cost.
        seed: Seed of ``plan="random"``.

    Returns:
        The value with its plan, cost and diagnostics.

    Raises:
        TypeError: If the neurons are not floating-point tensors.
        ValueError: If shapes do not fit, values are not finite, or an argument is out of range.
        RuntimeError: If the entropic plan does not converge.

    Example:
        >>> import torch
        >>> from lightning_otrt import transport_distance
        >>> teacher = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
        >>> student = teacher[torch.arange(31, -1, -1)].requires_grad_()  # the same neurons in another order
        >>> result = transport_distance(student, teacher)
        >>> bool(result.value.abs() < 1e-3)
        True
        >>> result.plan.shape
        torch.Size([32, 32])
        >>> result.value.backward()
    """
    rule = get_cost(cost)
    check_plan(plan, allowed=PLANS[:-1])
    check_epsilon(epsilon)
    _check_neurons(student, teacher, rule)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        batched = student.dim() == 3
        y, x = common_dtype(student.detach(), teacher.detach())
        y, x = (y, x) if batched else (y[None], x[None])
        energy = rule.energy(x)
        matrix = rule.matrix(rule.sums(y, x), energy).to(y.dtype)
        check_cost(matrix, cost)
        coupling = solve_plan(matrix, plan, epsilon, seed)
        value, gradient = rule.value(y, x, Plan.of(coupling), energy)
        if not batched:
            value, gradient, coupling, matrix = value[0], gradient[0], coupling[0], matrix[0]
    return TransportResult.of(attach_gradients(value, [student], [gradient]), coupling, matrix)


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


def run_rounds(
    rounds: Sequence[Rounds],
    reduce: Callable[[Sums], Sums] | None = None,
    replies: Sequence[Sums | None] | None = None,
) -> list[ValueAndGradient]:
    """Run generators of :meth:`Cost.shared_value` side by side, so that each of their rounds is one reduction for all.

    Args:
        rounds: One generator a pair.
        reduce: Sums a list of tensors over all processes; None for a single process, which is sent its own sums back.
        replies: What to send to generators whose first round is done; None for one that has not begun.
    """
    results: list[ValueAndGradient | None] = [None] * len(rounds)
    pending: dict[int, Sums | None] = dict(enumerate(replies or [None] * len(rounds)))
    while pending:
        asked: dict[int, Sums] = {}
        for index, reply in pending.items():
            try:
                asked[index] = next(rounds[index]) if reply is None else rounds[index].send(reply)
            except StopIteration as stop:
                results[index] = stop.value
        if reduce is not None and asked:
            flat = iter(reduce([tensor for sums in asked.values() for tensor in sums]))
            asked = {index: [next(flat) for _ in sums] for index, sums in asked.items()}
        pending = dict(asked)
    return [result for result in results if result is not None]


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError(
            "The transport distance can be differentiated only once: its plan is held fixed, so a second derivative "
            "would be wrong. Leave it out of what is differentiated twice, such as a gradient penalty."
        )


class _WithGradients(torch.autograd.Function):
    """A value computed beforehand together with its gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factors: Sequence[float], *tensors: Tensor) -> Tensor:
        count = len(factors)
        ctx.save_for_backward(*tensors[count:])
        ctx.factors, ctx.inputs = factors, [(tensor.shape, tensor.dtype) for tensor in tensors[:count]]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        grads = []
        count = len(ctx.inputs)
        anchors, gradients = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        grad_value = grad_value.detach()
        for anchor, gradient, factor, (shape, dtype) in zip(anchors, gradients, ctx.factors, ctx.inputs, strict=True):
            scale = grad_value if factor == 1 else grad_value * factor
            if scale.dim():
                scale = scale.reshape(scale.shape + (1,) * (gradient.dim() - scale.dim()))
            grad = (gradient * scale).to(dtype)
            # Not always: a view would be copied where it is accumulated.
            grad = grad if grad.shape == shape else grad.reshape(shape)
            # Under `create_graph=True`. `once_differentiable` is silent where the incoming gradient is a constant.
            grads.append(_Once.apply(grad, anchor) if torch.is_grad_enabled() else grad)
        return (None, None, *grads, *[None] * (2 * count))


def attach_gradients(
    value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor], factors: Sequence[float] | None = None
) -> Tensor:
    """``value``, with ``gradients`` times ``factors`` as its derivatives for ``inputs``; differentiable once."""
    # Empty tensors tie the gradients to the inputs, where a second derivative must raise, and keep no input alive.
    anchors = [tensor[..., :0].clone() for tensor in inputs]
    factors = [1.0] * len(inputs) if factors is None else factors
    return _WithGradients.apply(value, factors, *inputs, *anchors, *gradients)


def check_plan(plan: str, allowed: Sequence[str] = PLANS) -> None:
    """Raise a ValueError unless ``plan`` is one of ``allowed``."""
    if plan not in allowed:
        raise ValueError(f"Expected argument `plan` to be one of {list(allowed)}, but got {plan!r}.")


def check_epsilon(epsilon: float) -> None:
    """Raise a ValueError unless ``epsilon`` can match anything."""
    if not (isinstance(epsilon, (int, float)) and math.isfinite(epsilon) and 0 < epsilon < 1):
        raise ValueError(
            f"Expected argument `epsilon` to lie between 0 and 1, but got {epsilon!r}. It is relative to the mean "
            "cost: 0.01 is close to an exact plan, from 0.2 on nothing is matched, at 1 the plan is uniform."
        )


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise a ValueError that names ``where`` if a value is NaN or infinite. Waits for the device."""
    # A sum is far quicker than a look at each value; where it overflows that has to follow.
    if not bool(tensor.sum().isfinite()) and (bad := int((~torch.isfinite(tensor)).sum())):
        raise ValueError(
            f"{where} has {bad} NaN or infinite values of {tensor.numel()} (shape {tuple(tensor.shape)}), so no "
            "transport cost can be formed. Check its inputs and its weights."
        )


def check_values(tensor: Tensor, where: str) -> None:
    """Raise a ValueError that names ``where`` if values are not finite or their squares leave the range of their type.

    Waits for the device.
    """
    # One pass tells whether anything is wrong; which of these it is has to be told only then.
    norm = torch.linalg.vector_norm(tensor)
    if not bool(norm.isfinite()):
        check_finite(tensor, where)
        problem = "overflow"
    elif bool(norm < (torch.finfo(tensor.dtype).tiny * tensor.numel()) ** 0.5) and bool(tensor.any()):
        problem = "vanish in"
    else:
        return
    raise ValueError(
        f"{where} has values as large as {tensor.abs().max():.3g}, whose squares {problem} {tensor.dtype}, so no "
        "transport cost can be formed. Normalise the activations, or pass them in float64."
    )


def _check_neurons(student: Tensor, teacher: Tensor, rule: Cost) -> None:
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"Expected argument `{name}` to be a floating-point tensor, but got {got}.")
        if tensor.dim() not in (2, 3) or 0 in tensor.shape:
            raise ValueError(
                f"Expected argument `{name}` to have the non-empty shape (neurons, observations) or "
                f"(batch, neurons, observations), but got {tuple(tensor.shape)}."
            )
    if student.shape[:-2] != teacher.shape[:-2] or student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"Expected `student` {tuple(student.shape)} and `teacher` {tuple(teacher.shape)} to agree in all but the "
            "number of neurons (the second axis from the end): their observations are paired one to one."
        )
    if student.shape[-1] < rule.min_observations:
        raise ValueError(
            f"{student.shape[-1]} observations carry no correlation; at least {rule.min_observations} are needed."
        )
    if student.device != teacher.device:
        raise ValueError(f"`student` is on {student.device} but `teacher` on {teacher.device}; move one of them.")
    for where, side in zip(("`student`", "`teacher`"), common_dtype(student.detach(), teacher.detach()), strict=True):
        check_values(side, where)


def check_cost(matrix: Tensor, cost: object) -> None:
    """Raise a ValueError if a cost is not finite or negative. Waits for the device."""
    check_finite(matrix, f"The cost {cost!r}")
    if not bool(matrix.mean((-2, -1)).isfinite().all()):
        raise ValueError(
            f"Expected the cost {cost!r} to have a finite mean, to which epsilon is relative, but its values go up to "
            f"{matrix.max():.3g} and overflow {matrix.dtype}. Scale the cost."
        )
    if bool((matrix < 0).any()):
        raise ValueError(
            f"Expected the cost {cost!r} not to be negative, but its least value is {matrix.min():.3g}. Epsilon is "
            "relative to the mean cost; add a constant."
        )


def common_dtype(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32, or in float64 if either is."""
    if y.dtype == x.dtype == torch.float32:
        return y, x
    dtype = torch.promote_types(torch.promote_types(y.dtype, x.dtype), torch.float32)
    return y.to(dtype), x.to(dtype)
