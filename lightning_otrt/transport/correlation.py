"""The correlation cost: 1 - r, with its value and gradient in closed form (:meth:`CorrelationCost.value`)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_otrt.transport.cost import Cost, Evaluate, Plan, Rounds, Sums, ValueAndGradient, finite_and_factor
from lightning_otrt.transport.moments import (
    around_mean,
    centred,
    centred_over_processes,
    centred_squares,
    deviations,
    inverse_norm,
    moments,
)
from lightning_otrt.transport.tensors import (
    add_product,
    all_nonzero,
    decay_into,
    expanded,
    is_long,
    matrix_vector,
    observation_count,
    product,
    widen_if_long,
    zero_unless,
)

__all__ = ["CorrelationCost", "CovarianceCost"]


class CorrelationCost(Cost):
    """1 - r, with r the correlation of two neurons over the observations of the batch.

    Each neuron is centred by its own mean and by nothing else. A dead neuron costs 0 with a dead one and 1 with a live
    one, and has no gradient.
    """

    name = "correlation"
    min_observations = 3

    def sums(self, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None = None) -> Sums:
        """Count, first and second moments around ``reference``.

        Around a given reference all of them but the products of the two sides are in float64, which shows whether a
        neuron that is far from its reference varies at all. :meth:`accumulate` adds later batches up in their own type.
        """
        dtype = y.dtype
        y, x = widen_if_long(y, x)
        y0, x0 = reference or (y.mean(-1, keepdim=True), x.mean(-1, keepdim=True))
        (y, yy), (x, xx) = deviations(y, y0), deviations(x, x0)
        if reference is None:
            return [observation_count(y), y.sum(-1), x.sum(-1), yy, xx, y @ x.mT]
        (count, sum_y, yy), (_, sum_x, xx) = (moments(*centred_squares(side)).unbind(-1) for side in (y, x))
        return [count[..., 0], sum_y, sum_x, yy, xx, (y @ x.mT).to(dtype)]

    def matrix(self, sums: Sums, energy: Tensor | None) -> Tensor:
        """1 - r from the moments."""
        count, y, x, yy, xx, yx = sums
        count = count[..., None]
        inverse_y, dead_y = inverse_norm(around_mean(count, y, yy).sqrt())
        inverse_x, dead_x = inverse_norm(around_mean(count, x, xx).sqrt())
        # Three terms of rank one in one pass: the means, the constant 1, and -1 between dead neurons.
        left = torch.stack((y * inverse_y / count, torch.ones_like(y), -dead_y), -1)
        right = torch.stack((x * inverse_x, torch.ones_like(x), dead_x), -2)
        inverse_y, inverse_x, left, right = (part.to(yx.dtype) for part in (inverse_y, inverse_x, left, right))
        matrix = (yx * -inverse_y[..., None]).mul_(inverse_x[..., None, :])
        return add_product(matrix, left, right).clamp_min_(0)

    def accumulate(
        self, running: Sums, decay: float, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None
    ) -> Sums:
        """See :meth:`Cost.accumulate`; one matrix product that adds to the running one."""
        if is_long(y) or running[-1].dtype != y.dtype or reference is None:
            return super().accumulate(running, decay, y, x, reference)
        (y, yy), (x, xx) = deviations(y, reference[0]), deviations(x, reference[1])
        is_finite, factor = finite_and_factor(yy.sum(-1) + xx.sum(-1), decay)
        y, x, yy, xx, count = zero_unless(is_finite, y, x, yy, xx, observation_count(y))
        *parts, products = running
        for total, new in zip(parts, (count, y.sum(-1), x.sum(-1), yy, xx), strict=True):
            decay_into(total, expanded(factor, total), new)
        add_product(products.mul_(expanded(factor, products)), y, x.mT)
        return running

    def value(self, y: Tensor, x: Tensor, plan: Plan, energy: Tensor | None) -> ValueAndGradient:
        """Σ P - Σ_i ŷ_i·z_i - Σ_(dead, dead) P with z = P x̂; gradient -(z_i - (ŷ_i·z_i) ŷ_i) / ‖y_i - ȳ_i‖."""
        y, inverse_y = centred(y)
        x, inverse_x = centred(x)
        return _evaluate(y, inverse_y, x.mul_(inverse_x[..., None]), inverse_x, plan)

    def matrix_and_value(self, y: Tensor, x: Tensor, energy: Tensor | None) -> tuple[Tensor, Evaluate]:
        """See :meth:`Cost.matrix_and_value`; both need centred neurons and their norms."""
        if is_long(y):
            return super().matrix_and_value(y, x, energy)
        y, inverse_y = centred(y)
        x, inverse_x = centred(x)
        x.mul_(inverse_x[..., None])
        # 1, but 0 between two dead neurons.
        largest = y.new_ones(())
        if not all_nonzero(inverse_x):
            largest = torch.maximum(inverse_y.sign()[..., None], inverse_x.sign()[..., None, :])
        matrix = torch.addcmul(largest, y @ x.mT, inverse_y[..., None], value=-1).clamp_min_(0)
        return matrix, lambda plan: _evaluate(y, inverse_y, x, inverse_x, plan)

    def shared_value(self, y: Tensor, x: Tensor, plan: Plan, energy: Tensor | None) -> Rounds:
        """The same in two rounds: the moments of the neurons, then the products ŷ_i·z_i."""
        (y, norm_y), (x, norm_x) = yield from centred_over_processes(y, x)
        inverse_y, dead_y = inverse_norm(norm_y)
        inverse_x, dead_x = inverse_norm(norm_x)
        z = plan.matrix @ x.mul_(inverse_x[..., None])
        y.mul_(inverse_y[..., None])
        [products] = yield [torch.linalg.vecdot(y, z)]
        dead = torch.linalg.vecdot((plan.matrix @ dead_x[..., None]).squeeze(-1), dead_y)
        value = plan.student_mass.sum(-1) - products.sum(-1) - dead
        return value, z.addcmul_(y, products[..., None], value=-1).mul_(-inverse_y[..., None])

    def value_of_sums(
        self, y: Tensor, x: Tensor, plan: Plan, sums: Sums, energy: Tensor | None, reference: tuple[Tensor, Tensor]
    ) -> ValueAndGradient:
        """The products ŷ_i·z_i follow from the moments; the gradient is that of :meth:`value`."""
        dtype = y.dtype
        count, sum_y, sum_x, yy, xx, yx = sums
        mean_y, mean_x = sum_y / count, sum_x / count
        inverse_y, dead_y = inverse_norm(around_mean(count, sum_y, yy).sqrt())
        inverse_x, dead_x = inverse_norm(around_mean(count, sum_x, xx).sqrt())
        weights = plan.matrix.to(yx.dtype) * inverse_x.to(yx.dtype)
        # Row by row, products of the plan with the covariance; the means make a term of rank one.
        means = (weights @ mean_x.to(yx.dtype)).to(sum_y.dtype)
        products = (torch.linalg.vecdot(weights, yx) - sum_y * means) * inverse_y
        dead = torch.linalg.vecdot(plan.matrix @ dead_x.to(dtype), dead_y.to(dtype))
        value = plan.student_mass.sum() - products.sum() - dead
        y = (y - reference[0] - mean_y[:, None].to(dtype)).mul_(inverse_y[:, None].to(dtype))
        z = weights.to(dtype) @ (x - reference[1] - mean_x[:, None].to(dtype))
        gradient = z.addcmul_(y, products[:, None].to(dtype), value=-1).mul_(-inverse_y[:, None].to(dtype))
        return value.to(dtype), gradient

    def means(self, sums: Sums, reference: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The reference plus the mean deviation from it."""
        y, x = ((part / sums[0])[..., None].to(reference[0].dtype) for part in sums[1:3])
        return reference[0] + y, reference[1] + x


def _evaluate(y: Tensor, inverse_y: Tensor, x: Tensor, inverse_x: Tensor, plan: Plan) -> ValueAndGradient:
    """Value and gradient from centred student neurons, unit teacher neurons, and 1 / norms, 0 where neurons are dead.

    ``inverse_y`` is overwritten.
    """
    z = product(plan.matrix, x, like=y)
    products = torch.linalg.vecdot(y, z).mul_(inverse_y)
    value = plan.student_mass.sub(products)
    # Two dead neurons cost 0 instead of 1.
    if not all_nonzero(inverse_x):
        value = torch.where(inverse_y == 0, matrix_vector(plan.matrix, inverse_x.sign()), value)
    along = products.mul_(inverse_y).mul_(inverse_y)
    return value.sum(-1), z.mul_(inverse_y.neg_()[..., None]).addcmul_(y, along[..., None])


class CovarianceCost(CorrelationCost):
    """The correlation cost for orthogonal couplings of neurons that keep their scale. It has the same sums."""

    name = "covariance"
