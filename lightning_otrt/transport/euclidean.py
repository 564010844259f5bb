"""Squared and plain Euclidean costs in units of the teacher's mean square."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_otrt.transport.cost import Cost, Evaluate, Plan, Rounds, Sums, ValueAndGradient, finite_and_factor
from lightning_otrt.transport.tensors import (
    add_product,
    decay_into,
    dot,
    expanded,
    is_long,
    norms,
    observation_count,
    subtract_product,
    widen_if_long,
    zero_unless,
)

__all__ = ["EuclideanCost", "SquaredEuclideanCost"]

#: Share of the mean cost below which the gradient of a distance, 1/M, is scaled down.
DISTANCE_FLOOR = 1e-2


class SquaredEuclideanCost(Cost):
    """‖y - x‖² / (n s²), with s² the mean square of the raw teacher."""

    name = "sqeuclidean"
    scaled = True

    def sums(self, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None = None) -> Sums:
        """Count and squared distances.

        With a ``reference``, that is, to be added to others, they have the type of the neurons, however many there are.
        """
        squared = _squared_distances(*_centre(*widen_if_long(y, x)))
        squared = squared if reference is None else squared.to(y.dtype)
        return [observation_count(y).to(squared.dtype), squared]

    def accumulate(
        self, running: Sums, decay: float, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None
    ) -> Sums:
        """See :meth:`Cost.accumulate`; one matrix product that adds to the running one."""
        if is_long(y) or running[-1].dtype != y.dtype:
            return super().accumulate(running, decay, y, x, reference)
        y, x = _centre(y, x)
        yy, xx = norms(y).square_(), norms(x).square_()
        is_finite, factor = finite_and_factor(yy.sum(-1) + xx.sum(-1), decay)
        y, x, yy, xx, count = zero_unless(is_finite, y, x, yy, xx, observation_count(y))
        total, squared = running
        decay_into(total, factor, count)
        squared.mul_(expanded(factor, squared)).add_(yy[..., None]).add_(xx[..., None, :])
        add_product(squared, y, x.mT, alpha=-2)
        return running

    def matrix(self, sums: Sums, energy: Tensor | None) -> Tensor:
        """Mean squared distances over s²."""
        count, squared = sums
        return (squared / (count * _scale(energy))[..., None, None]).clamp_min_(0)

    def matrix_and_value(self, y: Tensor, x: Tensor, energy: Tensor | None) -> tuple[Tensor, Evaluate]:
        """See :meth:`Cost.matrix_and_value`; both need the neurons around the teacher's mean, and their squares."""
        if is_long(y):
            return super().matrix_and_value(y, x, energy)
        scale = y.shape[-1] * _scale(energy)
        y, x = _centre(y, x)
        squares = _squares(y, x)
        matrix = _squared_distances(y, x, squares).mul_(scale.reciprocal()[..., None, None])
        return matrix, lambda plan: _in_units_of(scale, *_transported_squares(y, x, squares, plan))

    def value(self, y: Tensor, x: Tensor, plan: Plan, energy: Tensor | None) -> ValueAndGradient:
        """Σ a_i ‖y_i‖² + Σ b_j ‖x_j‖² - 2 Σ y_i·z_i with z = P x; gradient 2 (a_i y_i - z_i), both over n s²."""
        y, x = _centre(y, x)
        total, half_gradient = _transported_squares(y, x, _squares(y, x), plan)
        return _in_units_of(y.shape[-1] * _scale(energy), total, half_gradient)

    def shared_value(self, y: Tensor, x: Tensor, plan: Plan, energy: Tensor | None) -> Rounds:
        """The same in one round of three numbers."""
        assert energy is not None
        y, x = _centre(y, x)
        total, half_gradient = _transported_squares(y, x, _squares(y, x), plan)
        total, count, energy = yield [total, observation_count(y), energy]
        return _in_units_of(count * _scale(energy), total, half_gradient)

    def value_of_sums(
        self, y: Tensor, x: Tensor, plan: Plan, sums: Sums, energy: Tensor | None, reference: tuple[Tensor, Tensor]
    ) -> ValueAndGradient:
        """Σ P_ij M_ij from the squared distances of all; the gradient is that of :meth:`value`."""
        value = (plan.matrix * self.matrix(sums, energy)).sum().to(y.dtype)
        y, x = _centre(y, x)
        half_gradient = torch.addcmul(-(plan.matrix @ x), plan.student_mass[:, None], y)
        return value, half_gradient.mul_((2 / (sums[0] * _scale(energy))).to(y.dtype))


class EuclideanCost(SquaredEuclideanCost):
    """‖y - x‖ / (√n s), with s² the mean square of the raw teacher: the cost of the paper.

    The gradient of a distance has the same norm at any distance. Below 1e-2 of the mean cost it is scaled down to zero,
    so that neurons that match stop moving. The value is not changed.
    """

    name = "euclidean"

    def matrix(self, sums: Sums, energy: Tensor | None) -> Tensor:
        """Root of the mean squared distances over s."""
        return super().matrix(sums, energy).sqrt_()

    def value(self, y: Tensor, x: Tensor, plan: Plan, energy: Tensor | None) -> ValueAndGradient:
        """Σ P_ij M_ij; gradient ((Σ_j W_ij) y_i - Σ_j W_ij x_j) / (n s²) with W = P / max(M, floor · mean M)."""
        unit = (y.shape[-1] * _scale(energy)).rsqrt_()
        y, x = _centre(y, x)
        return _from_distances(y, x, plan, _squared_distances(y, x).sqrt_(), unit, unit)

    def shared_value(self, y: Tensor, x: Tensor, plan: Plan, energy: Tensor | None) -> Rounds:
        """The same in one round, of the squared distances ``(..., N, M)`` and two numbers."""
        assert energy is not None
        count = observation_count(y)
        y, x = _centre(y, x)
        squared, count, energy = yield [_squared_distances(y, x), count, energy]
        unit = (count * _scale(energy)).rsqrt_()
        return _from_distances(y, x, plan, squared.sqrt_(), unit, unit)

    def value_of_sums(
        self, y: Tensor, x: Tensor, plan: Plan, sums: Sums, energy: Tensor | None, reference: tuple[Tensor, Tensor]
    ) -> ValueAndGradient:
        """The same from the squared distances of all."""
        unit = (sums[0] * _scale(energy)).rsqrt_().to(y.dtype)
        return _from_distances(*_centre(y, x), plan, sums[1].to(y.dtype, copy=True).sqrt_(), unit, unit)

    def matrix_and_value(self, y: Tensor, x: Tensor, energy: Tensor | None) -> tuple[Tensor, Evaluate]:
        """See :meth:`Cost.matrix_and_value`; the value is that of the distances over √n s."""
        if is_long(y):
            return super().matrix_and_value(y, x, energy)
        scale = y.shape[-1] * _scale(energy)
        y, x = _centre(y, x)
        matrix = _squared_distances(y, x).mul_(scale.reciprocal()[..., None, None]).sqrt_()
        return matrix, lambda plan: _from_distances(y, x, plan, matrix, torch.ones_like(scale), scale.reciprocal())


def _from_distances(
    y: Tensor, x: Tensor, plan: Plan, distances: Tensor, unit: Tensor, gradient_unit: Tensor
) -> ValueAndGradient:
    """Value, in ``unit``, and gradient, in ``gradient_unit``, of plain distances, which are overwritten."""
    value = dot(plan.matrix, distances) * unit
    # If all distances are zero so is their mean; with a floor above zero the gradient is then zero, not NaN.
    floor = (distances.mean((-2, -1), keepdim=True) * DISTANCE_FLOOR).clamp_min_(torch.finfo(y.dtype).tiny ** 0.5)
    weights = torch.div(plan.matrix, torch.maximum(distances, floor, out=distances), out=distances)
    gradient = subtract_product(y * weights.sum(-1, keepdim=True), weights, x)
    return value, gradient.mul_(gradient_unit[..., None, None])


def _transported_squares(y: Tensor, x: Tensor, squares: tuple[Tensor, Tensor], plan: Plan) -> tuple[Tensor, Tensor]:
    """Σ P_ij ‖y_i - x_j‖², and half of its gradient with respect to ``y``, a_i y_i - z_i; both sides are centred."""
    yy, xx = squares
    own = torch.linalg.vecdot(plan.student_mass, yy)
    half_gradient = subtract_product(y * plan.student_mass[..., None], plan.matrix, x)
    total = (2 * dot(y, half_gradient)).sub_(own)
    return total.add_(torch.linalg.vecdot(plan.teacher_mass, xx)), half_gradient


def _in_units_of(scale: Tensor, total: Tensor, half_gradient: Tensor) -> ValueAndGradient:
    """Value and gradient in units of ``scale``; ``half_gradient`` is overwritten."""
    return total / scale, half_gradient.mul_((2 / scale)[..., None, None])


def _centre(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides without the teacher's mean over neurons, which leaves distances unchanged and reduces cancellation."""
    centre = x.mean(-2, keepdim=True)
    return y - centre, x - centre


def _squares(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return norms(y).square_(), norms(x).square_()


def _squared_distances(y: Tensor, x: Tensor, squares: tuple[Tensor, Tensor] | None = None) -> Tensor:
    yy, xx = squares or _squares(y, x)
    return add_product(yy[..., None] + xx[..., None, :], y, x.mT, alpha=-2).clamp_min_(0)


def _scale(energy: Tensor | None) -> Tensor:
    """s²; 1 for a teacher that is zero everywhere."""
    assert energy is not None  # a cost that is scaled always gets it
    squares, count = energy.unbind(-1)
    scale = squares / count
    return torch.where(scale > 0, scale, 1.0)
