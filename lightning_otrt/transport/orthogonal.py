r"""The orthogonal coupling: targets for the student's neurons by the best rotation of the teacher's.

With y and x centred, each student neuron follows a combination of the teacher's neurons, z = Q x, where Q is the polar
factor of the cross-correlation C = Σ ŷ x̂ᵀ: the orthogonal Procrustes problem. The optimal transport term is unchanged
when the teacher's neurons are permuted, this one when they are rotated. So it suits layers without axes of their own,
such as residual streams.

How far neurons are standardised is one number, the power p. Each neuron is divided by its norm to that power, and then
each layer by its norm:

.. math:: \hat y_i = \frac{y_i}{\|y_i\|^p} \Big/ \Big\|\Big(\frac{y_k}{\|y_k\|^p}\Big)_k\Big\|_F, \quad
    \hat z_i = \frac{z_i}{\|z_i\|^p} \Big/ \Big\|\Big(\frac{z_k}{\|z_k\|^p}\Big)_k\Big\|_F, \quad
    \Omega = 1 - \sum_i \hat y_i \cdot \hat z_i

With p = 1 every neuron counts alike: Ω is the mean of 1 - r between student neurons and their targets. It is 0 for a
teacher whose neurons are permuted and rescaled. With p = 0 neurons keep their scale: Ω is 0 for a rotated teacher,
exactly.

*Widths.* For N < M the rows of Q are orthonormal: the student gets N directions of the teacher. For N > M the columns
are: this is the Procrustes problem after N - M neurons of zeros are added to the teacher, as in generalised shape
metrics (Williams et al. 2021, arXiv 2110.14739). All directions of the teacher are spread over the student's neurons,
and the targets have rank M. For p = 0 and N ≥ M, 1 - Ω is the normalised Bures similarity of the two Gram matrices of
samples (arXiv 2311.11436).

*Gradient.* Q and the targets are held fixed, as a plan is. For p = 0 and N ≥ M this is also the gradient of Ω with Q
solved again (envelope theorem), because ‖Q x‖ = ‖x‖ for every Q. For N < M or p > 0 the norms of the targets depend on
Q, and the two gradients differ.

*Dead neurons*, by the rule of the correlation cost, do not enter C, and have no target and no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_otrt.transport.correlation import CorrelationCost, CovarianceCost
from lightning_otrt.transport.cost import Cost, Rounds, Sums, ValueAndGradient
from lightning_otrt.transport.moments import (
    around_mean,
    centred,
    deviations,
    reciprocal_norm,
    without_means,
    without_rounding,
)
from lightning_otrt.transport.polar import polar_factor
from lightning_otrt.transport.tensors import add_product, dot, means, norms, product, widest

__all__ = ["Alignment", "OrthogonalAlignment", "fixed_projection", "random_projection"]

_MOMENTS = CorrelationCost()


class Alignment(NamedTuple):
    """A solved coupling, in the place of a transport plan.

    Attributes:
        matrix: From centred teacher neurons to targets, ``(..., N, M)``: Q, its columns over the teacher's norms to
            the p.
        correlations: C, of the same shape, in units in which both layers have norm 1. Its singular values sum to 1 at
            most, and to 1 for a student that agrees with its targets.
        directions: (Σ s)² / Σ s² of its singular values s, ``(...)``: over how many directions the agreement spreads.
            For a random projection it is a number without that meaning.
    """

    matrix: Tensor
    correlations: Tensor
    directions: Tensor

    @classmethod
    def fallback(cls, rows: int, columns: int) -> tuple[float, ...]:
        """The entries of each part where no solve has found an alignment yet: no targets, and so no gradient."""
        return 0.0, 0.0, 0.0


@dataclass(frozen=True)
class OrthogonalAlignment:
    """The coupling as a training run calls it. The state (sums, reference, matrix) belongs to the caller.

    A call *observes* a batch by :meth:`sums`, at times *solves* a matrix from the sums, and *evaluates* the batch by
    :meth:`value`. The sums add over views, steps and processes.

    Args:
        power: p of the module, from 0 (raw neurons) to 1 (standardised neurons).

    Example:
        >>> import torch
        >>> from lightning_otrt.transport.orthogonal import OrthogonalAlignment
        >>> generator = torch.Generator().manual_seed(0)
        >>> teacher = torch.randn(8, 100, generator=generator, dtype=torch.float64)
        >>> rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
        >>> student, coupling = rotation @ teacher, OrthogonalAlignment(power=0.0)
        >>> matrix = coupling.solve(coupling.sums(student, teacher))
        >>> value, gradient = coupling.value(student, teacher, matrix)
        >>> bool(value.abs() < 1e-12), gradient.shape
        (True, torch.Size([8, 100]))
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        """Raise a ValueError unless ``power`` lies between 0 and 1."""
        if not 0 <= self.power <= 1:
            raise ValueError(
                f"Expected argument `power` to lie between 0 (raw neurons) and 1 (standardised neurons), but got "
                f"{self.power!r}."
            )

    @classmethod
    def of_cost(cls, cost: Cost) -> OrthogonalAlignment:
        """The coupling that goes with a cost of the correlation family."""
        return cls(power=0.0 if isinstance(cost, CovarianceCost) else 1.0)

    def sums(self, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None = None) -> Sums:
        """Count, means, squares and products; those of :meth:`CorrelationCost.sums`."""
        return _MOMENTS.sums(y, x, reference)

    def problem(self, sums: Sums) -> tuple[Tensor, Tensor]:
        """What a matrix is solved from.

        Args:
            sums: Sums of the observations, of all processes.

        Returns:
            C ``(..., N, M)``, as in :class:`Alignment`, and the scale of each teacher neuron, 1 / norm to the p,
            ``(..., M)``. Both are NaN where the sums are not finite.
        """
        count, sum_y, sum_x, yy, xx, yx = sums
        inverse_y, inverse_x = (
            reciprocal_norm(around_mean(count[..., None], total, squares).sqrt())
            for total, squares in ((sum_y, yy), (sum_x, xx))
        )
        left, right = (sum_y / count[..., None])[..., None].to(yx.dtype), sum_x[..., None, :].to(yx.dtype)
        products = add_product(yx.clone(), left, right, alpha=-1)
        scale_y, unit_y = self._units(inverse_y)
        scale_x, unit_x = self._units(inverse_x)
        rows, columns = (scale * unit[..., None] for scale, unit in ((scale_y, unit_y), (scale_x, unit_x)))
        products.mul_(rows.to(yx.dtype)[..., None]).mul_(columns.to(yx.dtype)[..., None, :])
        return products, scale_x.to(yx.dtype)

    def align(self, problem: Sequence[Tensor], projection: Tensor | None = None) -> Alignment:
        """The alignment of a problem.

        Args:
            problem: Of :meth:`problem`.
            projection: Q of a control, ``(N, M)``, in place of the best one; see :func:`random_projection`.
        """
        correlations, scale = problem
        projection = polar_factor(correlations) if projection is None else projection.to(correlations)
        agreement = dot(projection.expand_as(correlations), correlations)
        squares = dot(correlations, correlations)
        directions = torch.where(squares == 0, 0.0, agreement.square() / squares)
        return Alignment(projection * scale[..., None, :], correlations, directions)

    def solve(self, sums: Sums, projection: Tensor | None = None) -> Tensor:
        """The matrix of :meth:`align` for the :meth:`problem` of these sums; NaN where they are not finite."""
        return self.align(self.problem(sums), projection).matrix

    def value(self, y: Tensor, x: Tensor, matrix: Tensor) -> ValueAndGradient:
        """Ω on these observations, and its gradient with respect to ``y``, the matrix and the target held fixed.

        Args:
            y: Student neurons ``(..., N, n)``.
            x: Teacher neurons ``(..., M, n)``.
            matrix: Of :meth:`solve`.

        Returns:
            The value ``(...)``, from 0 to 2, and the gradient, of the shape of ``y``. Where all neurons of a layer are
            dead, the value is 1 and the gradient 0.
        """
        y, inverse_y = centred(y)
        z = self._target(y, x, matrix)
        return self._evaluate(y, z, inverse_y, reciprocal_norm(norms(z)), torch.linalg.vecdot(y, z))

    def shared_value(self, y: Tensor, x: Tensor, matrix: Tensor) -> Rounds:
        """:meth:`value` where several processes each hold a part of the observations.

        One round of vectors, also in a call that solves: the norms of the targets follow from no sum that is known
        before the matrix is, unless all M x M products of the teacher's neurons travel too.

        Args:
            y: Student neurons ``(..., N, n)`` of this process.
            x: Teacher neurons ``(..., M, n)`` of this process.
            matrix: Of :meth:`solve`, the same on all processes.
        """
        mean_y, mean_x = means(y), means(x)
        y = deviations(y, mean_y)[0]
        z = self._target(y, x, matrix)
        mean_z = matrix @ mean_x
        local = _moments(y, z, mean_y, mean_z)
        [total] = yield [local]
        count, sum_y, sum_z, yy, zz, yz = total.unbind(-1)
        all_y, all_z = sum_y / count, sum_z / count
        yy = without_rounding((yy - sum_y * all_y).clamp_min(0), count, all_y)
        zz, yz = (zz - sum_z * all_z).clamp_min(0), yz - sum_y * all_z
        y = y + (mean_y - all_y[..., None]).to(y.dtype)
        z = z + (mean_z - all_z[..., None]).to(z.dtype)
        inverse_y, inverse_z = reciprocal_norm(yy.sqrt()), reciprocal_norm(zz.sqrt())
        return self._evaluate(y, z, inverse_y.to(y.dtype), inverse_z.to(y.dtype), yz.to(y.dtype))

    def value_of_sums(self, sums: Sums, squares: Tensor, matrix: Tensor) -> Tensor:
        """Ω ``(...)`` without the neurons, where the products of the teacher's neurons with each other are known.

        Rounding takes no value below 0.

        Args:
            sums: Of :meth:`sums`.
            squares: Σ x xᵀ of the same deviations, ``(..., M, M)``.
            matrix: Of :meth:`solve`.
        """
        count, sum_y, sum_x, yy, _, yx = sums
        count = count[..., None]
        mean_y, mean_z = sum_y / count, torch.linalg.vecdot(matrix, (sum_x / count)[..., None, :])
        zz = torch.linalg.vecdot(matrix @ squares, matrix) - count * mean_z.square()
        yz = torch.linalg.vecdot(matrix, yx) - count * mean_y * mean_z
        inverse_y = reciprocal_norm(around_mean(count, sum_y, yy).sqrt())
        scale_y, unit_y = self._units(inverse_y)
        scale_z, unit_z = self._units(reciprocal_norm(zz.clamp_min(0).sqrt()))
        return (1 - (yz * scale_y * scale_z).sum(-1) * unit_y * unit_z).clamp_min(0)

    def _scale(self, inverse: Tensor) -> Tensor:
        """1 / norm to the power p, 0 where a neuron is dead."""
        if self.power == 1:
            return inverse
        return torch.where(inverse == 0, 0.0, inverse**self.power)

    @staticmethod
    def _target(y: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
        """The centred targets z, in the layout of ``y``. The rounding of a constant teacher is no target."""
        return product(matrix, without_means(x), like=y)

    def _evaluate(
        self, y: Tensor, z: Tensor, inverse_y: Tensor, inverse_z: Tensor, products: Tensor
    ) -> ValueAndGradient:
        """From centred neurons and targets, their 1 / norms and the products y_i·z_i over all observations.

        ``z`` and ``products`` are overwritten.
        """
        p = self.power
        if p == 1:
            # The same as below in fewer operations, whose number is what counts for small layers.
            live = (inverse_y.count_nonzero(-1) * inverse_z.count_nonzero(-1)).clamp_min_(1)
            pull = (inverse_y * inverse_z).mul_(live.to(y.dtype).rsqrt_()[..., None])
            shares = products.mul_(pull)
            cosine = shares.sum(-1)
            along = shares.mul_(inverse_y).mul_(inverse_y)
            return 1 - cosine, z.mul_(pull.neg_()[..., None]).addcmul_(y, along[..., None])
        scale_y, unit_y = self._units(inverse_y)
        scale_z, unit_z = self._units(inverse_z)
        pull = (scale_y * scale_z).mul_((unit_y * unit_z)[..., None])
        shares = products * pull
        cosine = shares.sum(-1)
        # The part of the gradient along y_i, which the norms of the neuron and of its layer remove.
        along = shares.mul_(p * inverse_y.square())
        along = torch.addcmul(along, scale_y.square(), ((1 - p) * cosine * unit_y.square())[..., None])
        return 1 - cosine, z.mul_(pull.neg_()[..., None]).addcmul_(y, along[..., None])

    def _units(self, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Factors that take each neuron's norm to the power 1 - p, and the one that takes their layer to norm 1."""
        if self.power == 1:
            return inverse, inverse.count_nonzero(-1).clamp_min_(1).to(inverse.dtype).rsqrt()
        scale = self._scale(inverse)
        norm = torch.linalg.vector_norm(torch.where(inverse == 0, 0.0, scale / inverse), dim=-1)
        return scale, torch.where(norm == 0, 0.0, 1 / norm)


def fixed_projection(plan: str, rows: int, columns: int, *, seed: int) -> Tensor | None:
    """The projection of a control that does not look at the correlations, ``(N, M)``; None where it must be solved."""
    return random_projection(rows, columns, seed) if plan == "random_orthogonal" else None


def random_projection(rows: int, columns: int, seed: int) -> Tensor:
    """A fixed random Q ``(N, M)`` with orthonormal rows or columns: the control that shows what alignment adds."""
    generator = torch.Generator().manual_seed(seed)
    tall = torch.randn(max(rows, columns), min(rows, columns), generator=generator, dtype=torch.float64)
    # With these signs Q is uniformly distributed (arXiv math-ph/0609050).
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal().sign()
    return (q if rows >= columns else q.mT).float()


def _moments(y: Tensor, z: Tensor, mean_y: Tensor, mean_z: Tensor) -> Tensor:
    """Count, sums, squares and products ``(..., N, 6)`` from deviations and means; in the widest type."""
    dtype = widest(y)
    yy, zz, yz, mean_y, mean_z = (
        part.to(dtype)
        for part in (
            torch.linalg.vecdot(y, y),
            torch.linalg.vecdot(z, z),
            torch.linalg.vecdot(y, z),
            mean_y.squeeze(-1),
            mean_z.squeeze(-1),
        )
    )
    count = torch.full_like(yy, y.shape[-1])
    sum_y, sum_z = count * mean_y, count * mean_z
    return torch.stack((count, sum_y, sum_z, yy + sum_y * mean_y, zz + sum_z * mean_z, yz + sum_y * mean_z), -1)
