r"""Linear regression of the teacher's neurons on the student's: how much of the teacher a linear map predicts.

The map W is the ridge solution on running moments, in closed form, so there is nothing to train:

.. math:: W = C_{xy} (C_{yy} + \lambda D)^{-1}, \quad \Omega = 1 - R^2 = \frac{\|x - W y\|^2}{\|x\|^2}

with y and x centred. It is FitNets (arXiv 1412.6550) without the parameters of its projection. Up to the ridge, the
term is unchanged when the student's neurons are mixed by any invertible matrix. W is held fixed in the gradient.

Two uses: between layers, with standardised neurons, where every teacher neuron counts alike; and from what enters the
student's head to the teacher's logits, where the teacher has other classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_otrt.transport.correlation import CorrelationCost
from lightning_otrt.transport.cost import Rounds, Sums, ValueAndGradient
from lightning_otrt.transport.moments import around_mean, centred, centred_over_processes, reciprocal_norm
from lightning_otrt.transport.tensors import add_product, product, widen_if_long

__all__ = ["Regression"]

_MOMENTS = CorrelationCost()


@dataclass(frozen=True)
class Regression:
    """The regression as a training run calls it. The state (sums, reference, map) belongs to the caller.

    Args:
        standardised: Divide each neuron of both sides by its deviation on the batch, so that the value is the mean of
            1 - R² over the teacher's neurons. Otherwise neurons keep their scale, and the value is 1 - R² of the whole
            layer.
        ridge: λ, relative to the variance of each student neuron if standardised, else to their mean variance.

    Example:
        >>> import torch
        >>> from lightning_otrt.transport.regression import Regression
        >>> generator = torch.Generator().manual_seed(0)
        >>> student = torch.randn(8, 100, generator=generator)
        >>> teacher = torch.randn(3, 8, generator=generator) @ student
        >>> regression = Regression(ridge=1e-6)
        >>> weights = regression.solve(regression.sums(student, teacher))
        >>> value, gradient = regression.value(student, teacher, weights)
        >>> bool(value < 1e-6), weights.shape, gradient.shape
        (True, torch.Size([3, 8]), torch.Size([8, 100]))
    """

    standardised: bool = True
    ridge: float = 1e-3

    #: Fewest observations that carry a correlation.
    min_observations = 3

    def __post_init__(self) -> None:
        """Raise a ValueError unless ``ridge`` is positive."""
        if not 0 < self.ridge < float("inf"):
            raise ValueError(
                f"Expected argument `ridge` to be positive and finite, but got {self.ridge!r}. Without a ridge the map "
                "does not exist where a batch has fewer observations than the student has neurons."
            )

    def sums(self, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None = None) -> Sums:
        """The sums of :meth:`CorrelationCost.sums`, and before their last, Σ y yᵀ around the reference.

        They add over views, steps and processes.
        """
        dtype = y.dtype
        reference = reference or (y.mean(-1, keepdim=True), x.mean(-1, keepdim=True))
        sums = _MOMENTS.sums(y, x, reference)
        deviations, _ = widen_if_long(y, x)
        deviations = deviations - reference[0]
        return [*sums[:-1], (deviations @ deviations.mT).to(dtype), sums[-1]]

    def solve(self, sums: Sums) -> Tensor:
        """The map W, ``(..., M, N)``, from the student's centred neurons to the teacher's.

        Args:
            sums: Sums of the observations, of all processes.

        Returns:
            W between neurons of unit variance if standardised, else between raw ones; zero for dead neurons.
        """
        count, sum_y, sum_x, squares_y, squares_x, yy, yx = sums
        count, dtype = count[..., None], yx.dtype
        inverse_y = reciprocal_norm(around_mean(count, sum_y, squares_y).sqrt()).to(dtype)
        inverse_x = reciprocal_norm(around_mean(count, sum_x, squares_x).sqrt()).to(dtype)
        mean, sum_y, sum_x = (part.to(dtype) for part in (sum_y / count, sum_y, sum_x))
        yy = add_product(yy.clone(), mean[..., None], sum_y[..., None, :], alpha=-1)
        yx = add_product(yx.clone(), mean[..., None], sum_x[..., None, :], alpha=-1)
        # Solved between neurons of unit norm whatever the scale of the output: it loses the fewest digits.
        yy = yy.mul_(inverse_y[..., None]).mul_(inverse_y[..., None, :])
        yx = yx.mul_(inverse_y[..., None]).mul_(inverse_x[..., None, :])
        live = (inverse_y != 0).to(dtype)
        if self.standardised:
            ridge = torch.full_like(live, self.ridge)
        else:
            norms = torch.where(live > 0, 1 / inverse_y, 0.0)
            mean_square = norms.square().sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp_min(1)
            ridge = self.ridge * mean_square * inverse_y.square()
        # A dead neuron has a row of zeros: with 1 on the diagonal its weights are 0.
        yy.diagonal(dim1=-2, dim2=-1).add_(ridge * live + (1 - live))
        # Not `solve`, which makes the host wait for the device; a failure gives values that are not finite.
        factor, info = torch.linalg.cholesky_ex(yy)
        factor = torch.where((info == 0)[..., None, None], factor, torch.nan)
        weights = torch.cholesky_solve(yx, factor).mT
        if self.standardised:
            return weights
        return weights * torch.where(inverse_x == 0, 0.0, 1 / inverse_x)[..., None] * inverse_y[..., None, :]

    def value(self, y: Tensor, x: Tensor, weights: Tensor) -> ValueAndGradient:
        """1 - R² on these observations, and its gradient with respect to ``y``, the map held fixed.

        Args:
            y: Student neurons ``(..., N, n)``.
            x: Teacher neurons ``(..., M, n)``.
            weights: Of :meth:`solve`.

        Returns:
            The value ``(...)`` and the gradient, of the shape of ``y``. The value is above 1 where the map predicts the
            batch worse than the teacher's mean would.
        """
        y, inverse_y = centred(y)
        x, inverse_x = centred(x)
        total, pull = self._residual(y, x, weights, inverse_y, inverse_x)
        along = self._along(y, pull, inverse_y)
        return total, self._gradient(y, pull, along, inverse_y)

    def shared_value(self, y: Tensor, x: Tensor, weights: Tensor) -> Rounds:
        """:meth:`value` where several processes each hold a part of the observations: two rounds of vectors."""
        (y, norm_y), (x, norm_x) = yield from centred_over_processes(y, x)
        inverse_y, inverse_x = reciprocal_norm(norm_y), reciprocal_norm(norm_x)
        local, pull = self._residual(y, x, weights, inverse_y, inverse_x)
        total, along = yield [local, self._along(y, pull, inverse_y)]
        return total, self._gradient(y, pull, along, inverse_y)

    def _residual(
        self, y: Tensor, x: Tensor, weights: Tensor, inverse_y: Tensor, inverse_x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The share of these observations in the value, and the gradient with respect to the scaled ``y``."""
        live = (inverse_x != 0).to(x.dtype)
        if self.standardised:
            y, x = y * inverse_y[..., None], x * inverse_x[..., None]
            scale = live.sum(-1).clamp_min(1).reciprocal()
        else:
            squares = torch.where(live > 0, inverse_x.square().reciprocal(), 0.0).sum(-1)
            scale = torch.where(squares > 0, squares.reciprocal(), 0.0)
        # A teacher neuron that is dead on this batch has nothing to predict.
        residual = x.sub(product(weights, y, like=x)).mul_(live[..., None])
        value = torch.linalg.vecdot(residual, residual).sum(-1) * scale
        return value, product(weights.mT, residual, like=y).mul_((-2 * scale)[..., None, None])

    def _along(self, y: Tensor, pull: Tensor, inverse_y: Tensor) -> Tensor:
        """The part of the gradient along y_i / ‖y_i‖, which the norm of each student neuron removes."""
        return torch.linalg.vecdot(y, pull) * inverse_y

    def _gradient(self, y: Tensor, pull: Tensor, along: Tensor, inverse_y: Tensor) -> Tensor:
        if not self.standardised:
            return pull
        pull = pull.mul_(inverse_y[..., None])
        return pull.addcmul_(y, (along * inverse_y.square())[..., None], value=-1)
