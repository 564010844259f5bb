"""The transport distance between two sets of neurons: cost, plan, value and gradient put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from lightning_otrt.checks import check_seed
from lightning_otrt.transport.cost import Cost, Plan
from lightning_otrt.transport.diagnostics import diagnose
from lightning_otrt.transport.gradient import attach_gradients
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.orthogonal import Alignment, OrthogonalAlignment, fixed_projection
from lightning_otrt.transport.plans import (
    ONE_BATCH_PLANS,
    ORTHOGONAL,
    check_epsilon,
    check_plan,
    check_plan_and_cost,
    solve_plan,
)
from lightning_otrt.transport.tensor_checks import check_cost, check_floating, check_values
from lightning_otrt.transport.tensors import common_dtype, without_autocast

__all__ = ["TransportResult", "transport_distance"]


@dataclass(frozen=True, eq=False)
class TransportResult:
    """A transport distance with the plan behind it, :attr:`plan`, or with the :attr:`rotation`.

    Attributes:
        value: ⟨P, M⟩, a scalar or ``(B,)``; differentiable with respect to the student neurons.
        matrix: The plan or the rotation, ``(N, M)`` or ``(B, N, M)``; a constant.
        cost: M, of the same shape; a constant. Of an orthogonal coupling it is 1 - r.
        marginal_error: L1 distance of the teacher's masses to 1/M, of a total mass of 1. The student's are exact up to
            rounding for the plans solved here.
        student_marginal_error: The same on the student's side.
        entropy: Entropy of the plan over that of the uniform plan: 1 matches nothing.
        off_identity: Share of the mass off the diagonal for equal widths, else NaN.
        singular_values: Those of the cross-correlation behind an orthogonal coupling, ``(min(N, M),)`` or
            ``(B, min(N, M))``, the largest first: how much both layers agree along each direction. They sum to 1 at
            most. None for a transport plan. With an orthogonal coupling errors, entropy and ``off_identity`` are NaN.

    Example:
        >>> import torch
        >>> from lightning_otrt import transport_distance
        >>> teacher = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
        >>> result = transport_distance(teacher[[1, 0, 2, 3]], teacher, plan="exact")
        >>> result.plan.argmax(1), round(result.off_identity.item(), 2)
        (tensor([1, 0, 2, 3]), 0.5)
    """

    value: Tensor
    matrix: Tensor
    cost: Tensor
    marginal_error: Tensor
    student_marginal_error: Tensor
    entropy: Tensor
    off_identity: Tensor
    singular_values: Tensor | None = None

    def __repr__(self) -> str:
        """The value, and the shapes of the matrices in place of their entries."""
        value = self.value.detach()
        shown = f"{float(value):.4g}" if value.dim() == 0 else f"{tuple(value.shape)} values, mean {value.mean():.4g}"
        kind = "rotation" if self.singular_values is not None else "plan"
        return f"{type(self).__name__}({shown}, {kind} {tuple(self.matrix.shape)})"

    @property
    def plan(self) -> Tensor:
        """The transport plan P, ``(N, M)`` or ``(B, N, M)``.

        Raises:
            AttributeError: If an orthogonal coupling is behind the distance.
        """
        if self.singular_values is not None:
            raise AttributeError("An orthogonal coupling has no transport plan: use `rotation`, or `matrix` for both.")
        return self.matrix

    @property
    def rotation(self) -> Tensor:
        """The matrix from centred teacher neurons to the targets of the student's, for an orthogonal coupling.

        With ``cost="covariance"`` it is Q, with orthonormal rows for N ≤ M, and orthonormal columns for N ≥ M. With
        ``cost="correlation"`` each column of Q is divided by the norm of its teacher neuron over the observations:
        multiply it by these norms to get Q. Entries may be negative.

        Raises:
            AttributeError: If a transport plan is behind the distance.

        Example:
            >>> import torch
            >>> from lightning_otrt import transport_distance
            >>> y, x = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0))
            >>> norms = (x - x.mean(1, keepdim=True)).norm(dim=1)
            >>> rotation = transport_distance(y, x, plan="orthogonal").rotation * norms
            >>> torch.allclose(rotation @ rotation.T, torch.eye(4), atol=1e-5)
            True
        """
        if self.singular_values is None:
            raise AttributeError("A transport plan is no rotation: use `plan`, or `matrix` for both.")
        return self.matrix

    @classmethod
    def of(cls, value: Tensor, plan: Plan | Alignment, cost: Tensor) -> TransportResult:
        """A value with its plan, its cost and the diagnostics that follow from them."""
        if isinstance(plan, Alignment):
            none = torch.full_like(value, nan)
            return cls(value, plan.matrix, cost, none, none, none, none, torch.linalg.svdvals(plan.correlations))
        numbers = diagnose(plan.matrix)
        return cls(
            value=value,
            matrix=plan.matrix,
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

    with uniform masses (arXiv 2007.06737, equation 2). With ``plan="orthogonal"`` the targets of the student's neurons
    are rotated teacher neurons, z = Q x, and the distance is :math:`1 - \langle\hat y, \hat z\rangle`. Plan and
    targets are constants of the backward pass; the gradient flows to ``student`` alone.

    Args:
        student: Student neurons, ``(N, n)`` or ``(B, N, n)``: rows are neurons, columns observations.
        teacher: Teacher neurons, ``(M, n)`` or ``(B, M, n)``, over the same observations. A constant.
        cost: ``"correlation"`` (1 - r), ``"euclidean"``, ``"sqeuclidean"`` (both in units of the teacher's root mean
            square activation and per observation) or a function of the raw neurons, in float32 or wider, that gives the
            ``(N, M)`` costs. An orthogonal plan takes ``"correlation"`` (standardised neurons) or ``"covariance"``
            (neurons keep their scale, and a rotated copy is at distance 0).
        plan: ``"sinkhorn"`` (entropic, by GeomLoss' annealed loop and then alternating updates until the marginal error
            is below 1e-3), ``"exact"``, ``"orthogonal"`` (the best rotation), or a control: ``"identity"``,
            ``"uniform"``, ``"random"``, ``"random_orthogonal"``.
        epsilon: Entropic regularisation, relative to the mean cost.
        seed: Seed of random plans and rotations.

    Returns:
        The value with its plan, cost and diagnostics.

    Raises:
        TypeError: If the neurons are not floating-point tensors, or ``cost`` is no name and cannot be called.
        ValueError: If shapes do not fit, values are not finite, or an argument is out of range.
        RuntimeError: If the entropic plan does not converge.
        ModuleNotFoundError: If POT, which finds exact plans, is not installed.

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
    check_plan(plan, allowed=ONE_BATCH_PLANS)
    check_plan_and_cost(plan, rule)
    check_epsilon(epsilon)
    check_seed("seed", seed)
    _check_neurons(student, teacher, rule)
    with torch.no_grad(), without_autocast(student):
        batched = student.dim() == 3
        y, x = common_dtype(student.detach(), teacher.detach())
        y, x = (y, x) if batched else (y[None], x[None])
        energy = rule.energy(x)
        coupling: Plan | Alignment
        if plan in ORTHOGONAL:
            sums = rule.sums(y, x)
            matrix = rule.matrix(sums, energy).to(y.dtype)
            check_cost(matrix, cost)
            alignment = OrthogonalAlignment.of_cost(rule)
            projection = fixed_projection(plan, y.shape[1], x.shape[1], seed=seed)
            coupling = alignment.align([part.to(y.dtype) for part in alignment.problem(sums)], projection)
            value, gradient = alignment.value(y, x, coupling.matrix)
        else:
            problem, evaluate = rule.matrix_and_value(y, x, energy)
            check_cost(problem, cost)
            matrix, coupling = problem.clone(), Plan.of(solve_plan(problem, plan, float(epsilon), seed))
            value, gradient = evaluate(coupling)
        if not batched:
            value, gradient, matrix = value[0], gradient[0], matrix[0]
            coupling = type(coupling)(*(part[0] for part in coupling))
    return TransportResult.of(attach_gradients(value, [student], [gradient]), coupling, matrix)


def _check_neurons(student: Tensor, teacher: Tensor, rule: Cost) -> None:
    for name, tensor in (("student", student), ("teacher", teacher)):
        check_floating(name, tensor)
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
