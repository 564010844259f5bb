"""Ground costs between neurons, and the value and gradient of their transport with the plan held fixed.

Student neurons are the rows of ``y`` ``(..., N, n)``, teacher neurons those of ``x`` ``(..., M, n)``; leading
dimensions are a batch of pairs. Everything here runs without autograd and returns gradients in closed form (the
envelope theorem: the plan is a constant), so that no graph over a cost matrix is ever kept.

What a cost needs of a mini-batch are sums over observations. They add over views, over steps (the running cost) and
over processes (the global batch). A value is a generator: it *yields* the sums of this process and is *sent* those of
all processes, once a round; its ``return`` is the pair (value, gradient for the student neurons of this process).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CallableCost",
    "CorrelationCost",
    "Cost",
    "EuclideanCost",
    "Plan",
    "Rounds",
    "SquaredEuclideanCost",
    "Sums",
    "ValueAndGradient",
    "are_all",
    "are_finite",
    "get_cost",
]

#: A neuron whose centred norm is below this share of its layer's mean norm carries no correlation: it is *dead*.
DEAD_SHARE = 1e-3
#: Share of the mean cost below which the gradient of a distance, 1/M, is no longer followed.
DISTANCE_FLOOR = 1e-2
#: Above so many observations a float32 sum loses digits that a correlation needs.
FLOAT64_OBSERVATIONS = 100_000

Sums = list[Tensor]
ValueAndGradient = tuple[Tensor, Tensor]
Rounds = Generator[Sums, Sums, ValueAndGradient]


class Plan(NamedTuple):
    """A transport plan with its own masses, which differ from 1/N and 1/M where the solver has not converged.

    Attributes:
        matrix: ``(..., N, M)``.
        student_mass: Row sums a, ``(..., N)``.
        teacher_mass: Column sums b, ``(..., M)``.
    """

    matrix: Tensor
    student_mass: Tensor
    teacher_mass: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Plan:
        """The plan with the masses that its matrix has."""
        return cls(matrix, matrix.sum(-1), matrix.sum(-2))


class Cost(ABC):
    """A ground cost M between student and teacher neurons."""

    def __str__(self) -> str:
        """The name of the cost, the same in every process and run."""
        return type(self).__name__

    #: Whether the mean square of the teacher scales the cost (see :meth:`energy`).
    scaled: bool = False
    #: Whether value and gradient need the cost matrix, so that one made for the plan saves work.
    needs_matrix: bool = False
    #: Fewest observations from which the cost can be formed.
    min_observations: int = 1

    @abstractmethod
    def sums(self, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None = None) -> Sums:
        """Sums over the observations of ``y`` and ``x`` from which :meth:`matrix` follows.

        Args:
            y: Student neurons ``(..., N, n)``.
            x: Teacher neurons ``(..., M, n)``.
            reference: Points ``(..., N, 1)`` and ``(..., M, 1)`` near the neurons' means. Sums that are added to others
                must share it; None takes the means of this batch.
        """

    @abstractmethod
    def matrix(self, sums: Sums, energy: Tensor) -> Tensor:
        """The cost matrix ``(..., N, M)`` of the observations behind ``sums``."""

    def accumulate(
        self, running: Sums, decay: float, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None
    ) -> Sums:
        """``decay`` times ``running`` plus :meth:`sums`; ``running`` may be overwritten.

        A batch that is not finite adds nothing, without asking the device whether it is.
        """
        new = self.sums(y, x, reference)
        fits = are_finite(new)
        return [torch.where(fits, decay * old + part, old) for old, part in zip(running, new, strict=True)]

    @abstractmethod
    def value(self, y: Tensor, x: Tensor, plan: Plan, energy: Tensor, *, shared: bool = True) -> Rounds:
        """⟨P, M⟩ on these observations and its gradient for ``y``, the plan held fixed; see the module.

        Args:
            y: Student neurons.
            x: Teacher neurons.
            plan: The plan.
            energy: See :meth:`energy`.
            shared: Whether other processes have observations too. If not, rounds may be left out.
        """

    def value_of_sums(
        self, y: Tensor, x: Tensor, plan: Plan, sums: Sums, energy: Tensor, reference: tuple[Tensor, Tensor]
    ) -> ValueAndGradient:
        """What :meth:`value` returns, without a round, where the sums of all processes are known.

        Args:
            y: Student neurons ``(N, n)`` of this process.
            x: Teacher neurons ``(M, n)`` of this process.
            plan: The plan.
            sums: :meth:`sums` of this batch around ``reference``, of all processes.
            energy: The scale of the teacher, of all processes.
            reference: The points of :meth:`sums`.
        """
        raise NotImplementedError(f"{type(self).__name__} is no sum over observations, so it has no global batch.")

    def value_of_matrix(self, y: Tensor, x: Tensor, plan: Plan, matrix: Tensor, energy: Tensor) -> ValueAndGradient:
        """What :meth:`value` returns, where the cost matrix of these observations is at hand; it is overwritten."""
        raise NotImplementedError(f"{type(self).__name__} needs no cost matrix for its value.")

    def means(self, sums: Sums, reference: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The means of the neurons, the best ``reference`` of the next sums, where ``sums`` know them."""
        return reference

    def energy(self, x: Tensor) -> Tensor:
        """Sum of squares and count of the raw teacher, ``(..., 2)``: additive, their ratio is the scale s²."""
        total = torch.linalg.vecdot(x.flatten(-2), x.flatten(-2))
        return torch.stack((total, torch.full_like(total, x.shape[-1] * x.shape[-2])), -1)


class CorrelationCost(Cost):
    """1 - r, with r the correlation of two neurons over the observations of the batch.

    Each neuron is centred by its own mean and by nothing else. A dead neuron costs 0 with a dead one and 1 with a live
    one, and has no gradient.
    """

    min_observations = 3

    def sums(self, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None = None) -> Sums:
        """Count, first and second moments around ``reference``; around a given one the squares are in float64."""
        if y.shape[-1] > FLOAT64_OBSERVATIONS:
            y, x = y.double(), x.double()
        y0, x0 = reference or (y.mean(-1, keepdim=True), x.mean(-1, keepdim=True))
        (y, yy), (x, xx) = _deviations(y, y0), _deviations(x, x0)
        if reference is None:
            return [_count(y), y.sum(-1), x.sum(-1), yy, xx, y @ x.mT]
        (count, sum_y, yy), (_, sum_x, xx) = (_moments(*_centred_squares(side)).unbind(-1) for side in (y, x))
        return [count[..., 0], sum_y, sum_x, yy, xx, y @ x.mT]

    def matrix(self, sums: Sums, energy: Tensor) -> Tensor:
        """1 - r from the moments."""
        count, y, x, yy, xx, yx = sums
        count = count[..., None]
        inverse_y, dead_y = _inverse_norm(_around_mean(count, y, yy).sqrt())
        inverse_x, dead_x = _inverse_norm(_around_mean(count, x, xx).sqrt())
        # What the means take off, the one, and what two dead neurons take off: three terms of rank one in one pass.
        left = torch.stack((y * inverse_y / count, torch.ones_like(y), -dead_y), -1)
        right = torch.stack((x * inverse_x, torch.ones_like(x), dead_x), -2)
        inverse_y, inverse_x, left, right = (part.to(yx.dtype) for part in (inverse_y, inverse_x, left, right))
        matrix = (yx * -inverse_y[..., None]).mul_(inverse_x[..., None, :])
        return _add_product(matrix, left, right).clamp_min_(0)

    def accumulate(
        self, running: Sums, decay: float, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None
    ) -> Sums:
        """See :meth:`Cost.accumulate`; one matrix product that adds to the running one."""
        if y.shape[-1] > FLOAT64_OBSERVATIONS or running[-1].dtype != y.dtype or reference is None:
            return super().accumulate(running, decay, y, x, reference)
        (y, yy), (x, xx) = _deviations(y, reference[0]), _deviations(x, reference[1])
        fits = torch.isfinite(yy.sum() + xx.sum())
        y, x, yy, xx, count = _only_if(fits, y, x, yy, xx, _count(y))
        decayed = torch.where(fits, y.new_full((), decay), 1.0)  # of two numbers it would be float32
        torch._foreach_mul_(running, decayed)
        torch._foreach_add_(running[:-1], [count, y.sum(-1), x.sum(-1), yy, xx])
        _add_product(running[-1], y, x.mT)
        return running

    def value(self, y: Tensor, x: Tensor, plan: Plan, energy: Tensor, *, shared: bool = True) -> Rounds:
        """Σ P - Σ_i ŷ_i·z_i - Σ_(dead, dead) P with z = P x̂; gradient -(z_i - (ŷ_i·z_i) ŷ_i) / ‖y_i - ȳ_i‖."""
        if not shared:
            return self._value_alone(y, x, plan)
        mean_y, mean_x = y.mean(-1, keepdim=True), x.mean(-1, keepdim=True)
        y, x = y - mean_y, x - mean_x
        squares_y, squares_x = torch.linalg.vecdot(y, y), torch.linalg.vecdot(x, x)
        # Moments are sent, not norms around the means of one process: in float64, where their cancellation is harmless.
        count = y.shape[-1]
        local = [_moments(count, mean_y, squares_y), _moments(count, mean_x, squares_x)]
        total = yield local
        if total is local:
            squares_y = _without_rounding(squares_y, count, mean_y.squeeze(-1))
            squares_x = _without_rounding(squares_x, count, mean_x.squeeze(-1))
        else:
            shift_y, squares_y = _recentre(total[0], mean_y)
            shift_x, squares_x = _recentre(total[1], mean_x)
            y, x = y + shift_y, x + shift_x
        inverse_y, dead_y = _inverse_norm(squares_y.sqrt())
        inverse_x, dead_x = _inverse_norm(squares_x.sqrt())
        z = plan.matrix @ x.mul_(inverse_x[..., None])
        y = y.mul_(inverse_y[..., None])
        [products] = yield [torch.linalg.vecdot(y, z)]
        dead = torch.linalg.vecdot((plan.matrix @ dead_x[..., None]).squeeze(-1), dead_y)
        value = plan.student_mass.sum(-1) - products.sum(-1) - dead
        return value, z.addcmul_(y, products[..., None], value=-1).mul_(-inverse_y[..., None])

    @staticmethod
    def _value_alone(y: Tensor, x: Tensor, plan: Plan) -> ValueAndGradient:
        """The same in few passes: neurons are centred, and their norms are factors of rows."""
        y, inverse_y = _centred(y)
        x, inverse_x = _centred(x)
        z = _product(plan.matrix, x.mul_(inverse_x[..., None]), like=y)
        products = torch.linalg.vecdot(y, z).mul_(inverse_y)
        value = plan.student_mass.sub(products)
        # Two dead neurons cost 0 instead of 1.
        if not are_all(inverse_x):
            value.sub_(_matrix_vector(plan.matrix, (inverse_x == 0).to(y.dtype)).mul_(inverse_y == 0))
        along = products.mul_(inverse_y).mul_(inverse_y)
        return value.sum(-1), z.mul_(inverse_y.neg_()[..., None]).addcmul_(y, along[..., None])

    def value_of_sums(
        self, y: Tensor, x: Tensor, plan: Plan, sums: Sums, energy: Tensor, reference: tuple[Tensor, Tensor]
    ) -> ValueAndGradient:
        """The rows ŷ_i·z_i from the moments; the gradient as in :meth:`value`."""
        dtype = y.dtype
        count, sum_y, sum_x, yy, xx, yx = sums
        mean_y, mean_x = sum_y / count, sum_x / count
        inverse_y, dead_y = _inverse_norm(_around_mean(count, sum_y, yy).sqrt())
        inverse_x, dead_x = _inverse_norm(_around_mean(count, sum_x, xx).sqrt())
        weights = plan.matrix.to(yx.dtype) * inverse_x.to(yx.dtype)
        # Row products with the covariance times the count, whose mean part has rank one.
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


class SquaredEuclideanCost(Cost):
    """‖y - x‖² / (n s²), with s² the mean square of the raw teacher."""

    scaled = True

    def sums(self, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None = None) -> Sums:
        """Count and squared distances."""
        if y.shape[-1] > FLOAT64_OBSERVATIONS:
            y, x = y.double(), x.double()
        return [y.new_full(y.shape[:-2], y.shape[-1]), _squared_distances(*_centre(y, x))]

    def accumulate(
        self, running: Sums, decay: float, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None
    ) -> Sums:
        """See :meth:`Cost.accumulate`; one matrix product that adds to the running one."""
        if y.shape[-1] > FLOAT64_OBSERVATIONS or running[-1].dtype != y.dtype:
            return super().accumulate(running, decay, y, x, reference)
        y, x = _centre(y, x)
        yy, xx = _norms(y).square_(), _norms(x).square_()
        fits = torch.isfinite(yy.sum() + xx.sum())
        y, x, yy, xx, count = _only_if(fits, y, x, yy, xx, _count(y))
        decayed = torch.where(fits, y.new_full((), decay), 1.0)  # of two numbers it would be float32
        torch._foreach_mul_(running, decayed)
        running[0].add_(count)
        _add_product(running[1].add_(yy[..., None]).add_(xx[..., None, :]), y, x.mT, alpha=-2)
        return running

    def matrix(self, sums: Sums, energy: Tensor) -> Tensor:
        """Mean squared distances over s²."""
        count, squared = sums
        return (squared / (count * _scale(energy))[..., None, None]).clamp_min_(0)

    def value(self, y: Tensor, x: Tensor, plan: Plan, energy: Tensor, *, shared: bool = True) -> Rounds:
        """Σ a_i ‖y_i‖² + Σ b_j ‖x_j‖² - 2 Σ y_i·z_i with z = P x; gradient 2 (a_i y_i - z_i), both over n s²."""
        count = _count(y)
        y, x = _centre(y, x)
        own = torch.linalg.vecdot(plan.student_mass, _norms(y).square_())
        pull = _pull(y * plan.student_mass[..., None], plan.matrix, x)
        total = (2 * _dot(y, pull)).sub_(own)
        total = total.add_(torch.linalg.vecdot(plan.teacher_mass, _norms(x).square_()))
        total, count, energy = yield [total, count, energy]
        scale = count * _scale(energy)
        return total / scale, pull.mul_((2 / scale)[..., None, None])

    def value_of_sums(
        self, y: Tensor, x: Tensor, plan: Plan, sums: Sums, energy: Tensor, reference: tuple[Tensor, Tensor]
    ) -> ValueAndGradient:
        """Σ P_ij M_ij; the gradient as in :meth:`value`."""
        value = (plan.matrix * self.matrix(sums, energy)).sum().to(y.dtype)
        y, x = _centre(y, x)
        pull = torch.addcmul(-(plan.matrix @ x), plan.student_mass[:, None], y)
        return value, pull.mul_((2 / (sums[0] * _scale(energy))).to(y.dtype))


class EuclideanCost(SquaredEuclideanCost):
    """‖y - x‖ / (√n s), with s² the mean square of the raw teacher: the cost of the paper.

    The gradient of a distance is a unit vector, whatever the distance; below 1e-2 of the mean cost it is shrunk to
    zero, so that matched neurons come to rest. The value is not changed.
    """

    needs_matrix = True

    def matrix(self, sums: Sums, energy: Tensor) -> Tensor:
        """Root of the mean squared distances over s."""
        return super().matrix(sums, energy).sqrt_()

    def value(self, y: Tensor, x: Tensor, plan: Plan, energy: Tensor, *, shared: bool = True) -> Rounds:
        """Σ P_ij M_ij; gradient ((Σ_j W_ij) y_i - Σ_j W_ij x_j) / (n s²) with W = P / max(M, floor · mean M)."""
        count = _count(y)
        y, x = _centre(y, x)
        squared, count, energy = yield [_squared_distances(y, x), count, energy]
        unit = (count * _scale(energy)).rsqrt_()
        return self._follow(y, x, plan, squared.sqrt_(), unit, unit)

    def value_of_sums(
        self, y: Tensor, x: Tensor, plan: Plan, sums: Sums, energy: Tensor, reference: tuple[Tensor, Tensor]
    ) -> ValueAndGradient:
        """The same from the squared distances of all."""
        unit = (sums[0] * _scale(energy)).rsqrt_().to(y.dtype)
        return self._follow(*_centre(y, x), plan, sums[1].to(y.dtype, copy=True).sqrt_(), unit, unit)

    def value_of_matrix(self, y: Tensor, x: Tensor, plan: Plan, matrix: Tensor, energy: Tensor) -> ValueAndGradient:
        """The same from the distances over √n s."""
        scale = _count(y) * _scale(energy)
        return self._follow(*_centre(y, x), plan, matrix, torch.ones_like(scale), scale.reciprocal())

    @staticmethod
    def _follow(
        y: Tensor, x: Tensor, plan: Plan, distances: Tensor, unit: Tensor, gradient_unit: Tensor
    ) -> ValueAndGradient:
        """Value and gradient up to units, from distances, which are overwritten."""
        value = _dot(plan.matrix, distances) * unit
        # Where all distances are zero so is the floor, and the gradient is zero times anything finite.
        floor = (distances.mean((-2, -1), keepdim=True) * DISTANCE_FLOOR).clamp_min_(torch.finfo(y.dtype).tiny ** 0.5)
        weights = torch.div(plan.matrix, torch.maximum(distances, floor, out=distances), out=distances)
        pull = _pull(y * weights.sum(-1, keepdim=True), weights, x)
        return value, pull.mul_(gradient_unit[..., None, None])


class CallableCost(Cost):
    """A user's cost: a function of raw neurons ``(N, n)`` and ``(M, n)`` that gives a differentiable ``(N, M)``.

    It need not be a sum over observations, so running costs average its matrices, and it has no global batch.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def __str__(self) -> str:
        """The name of the function: its address would differ from run to run."""
        return getattr(self.function, "__qualname__", type(self.function).__name__)

    def sums(self, y: Tensor, x: Tensor, reference: tuple[Tensor, Tensor] | None = None) -> Sums:
        """Count and the matrix times the count."""
        return [y.new_full(y.shape[:-2], y.shape[-1]), self._matrix(y, x) * y.shape[-1]]

    def matrix(self, sums: Sums, energy: Tensor) -> Tensor:
        """The average of the matrices, weighted by their observations."""
        return sums[1] / sums[0][..., None, None]

    def value(self, y: Tensor, x: Tensor, plan: Plan, energy: Tensor, *, shared: bool = True) -> Rounds:
        """⟨P, M⟩ and its gradient by autograd through the user's function."""
        # Inference mode, in which Lightning validates, records no gradient, and none can be had of tensors born in it.
        with torch.inference_mode(False), torch.enable_grad():
            y, x, matrix = (t.clone() if t.is_inference() else t for t in (y, x, plan.matrix))
            y = y.detach().requires_grad_()
            value = (matrix * self._matrix(y, x)).sum((-2, -1))
            if not value.requires_grad:
                raise ValueError(
                    f"The cost {self.function!r} does not depend on the student neurons in a differentiable way, so it "
                    "has no gradient. Compute it with torch operations on its first argument."
                )
            (gradient,) = torch.autograd.grad(value.sum(), y)
        return value.detach(), gradient
        yield  # a generator without rounds

    def _matrix(self, y: Tensor, x: Tensor) -> Tensor:
        if y.dim() > 2:
            return torch.stack([self._matrix(*pair) for pair in zip(y, x, strict=True)])
        matrix = self.function(y, x)
        expected = (y.shape[-2], x.shape[-2])
        if not isinstance(matrix, Tensor) or tuple(matrix.shape) != expected:
            got = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(
                f"Expected the cost {self.function!r} to give a tensor of shape {expected}, but got {got}."
            )
        return matrix


def get_cost(cost: str | Callable[[Tensor, Tensor], Tensor] | Cost) -> Cost:
    """The cost of that name.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither a name nor callable.
    """
    named: dict[str, type[Cost]] = {
        "correlation": CorrelationCost,
        "euclidean": EuclideanCost,
        "sqeuclidean": SquaredEuclideanCost,
    }
    if isinstance(cost, Cost):
        return cost
    if isinstance(cost, str):
        if cost not in named:
            raise ValueError(f"Expected argument `cost` to be one of {list(named)} or a callable, but got {cost!r}.")
        return named[cost]()
    if callable(cost):
        return CallableCost(cost)
    raise TypeError(f"Expected argument `cost` to be a name or a callable, but got {type(cost).__name__}.")


def _inverse_norm(norm: Tensor) -> tuple[Tensor, Tensor]:
    """1 / norm where a neuron is live and 0 where it is dead, and 1 where it is dead."""
    mean = norm.mean(-1, keepdim=True)
    norm = torch.add(norm, mean, alpha=0)  # NaN where one is infinite: else the others would count as dead
    dead = norm <= DEAD_SHARE * mean
    return torch.where(dead, 0.0, 1.0 / norm), dead.to(norm.dtype)


def _centred(y: Tensor) -> tuple[Tensor, Tensor]:
    """Neurons without their means, and 1 / norm where they are live and 0 where they are dead or rounding."""
    mean = y.mean(-1, keepdim=True)
    y = y - mean
    norm = _norms(y)
    rounding = mean.squeeze(-1).abs_().mul_(_rounding_share(y.dtype) ** 0.5 * y.shape[-1] ** 0.5)
    average = norm.mean(-1, keepdim=True)
    norm = torch.add(norm, average, alpha=0)  # as in `_inverse_norm`
    dead = norm <= torch.maximum(rounding, average.mul_(DEAD_SHARE))
    return y, norm.reciprocal_().masked_fill_(dead, 0.0)


def are_finite(sums: Sums) -> Tensor:
    """Whether all sums are finite, a scalar on their device."""
    return torch.stack([part.sum() for part in sums]).sum().isfinite()


def are_all(values: Tensor) -> bool:
    """Whether it is certain that no value is 0. A CPU is asked, which saves it passes; for a device nothing waits."""
    return values.device.type == "cpu" and bool(values.all())


def _centred_squares(y: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, means ``(..., N, 1)`` and sums of squares around them; zeros where there are no observations."""
    mean = y.sum(-1, keepdim=True) / max(y.shape[-1], 1)
    return y.shape[-1], mean, _without_rounding(_norms(y - mean).square_(), y.shape[-1], mean.squeeze(-1))


def _around_mean(count: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """Sums of squares around the means, from the moments around any point; 0 where they are rounding."""
    mean = total / count
    return _without_rounding(squares - total * mean, count, mean).clamp_min(0)


def _moments(count: int, mean: Tensor, squares: Tensor) -> Tensor:
    """Count, sum and sum of squares ``(..., N, 3)`` in float64, from a mean and centred squares."""
    mean = mean.squeeze(-1).double()
    return torch.stack((torch.full_like(mean, count), count * mean, count * mean**2 + squares), -1)


def _recentre(total: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """What to add to neurons centred by ``mean`` to centre them by the mean of all, and their centred squares."""
    count, sums, squares = total.unbind(-1)
    overall = sums / count
    centred = (squares - count * overall**2).clamp_min(0).to(mean.dtype)
    shift = (mean.double() - overall[..., None]).to(mean.dtype)
    return shift, _without_rounding(centred, count.to(mean.dtype), overall.to(mean.dtype))


def _deviations(y: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Deviations from ``reference`` and their sums of squares, both 0 where they are rounding."""
    y = y - reference
    squares = _without_rounding(_norms(y).square_(), y.shape[-1], reference.squeeze(-1))
    if not are_all(squares):
        # Not `masked_fill_`, which takes ten times as long.
        y.mul_((squares != 0)[..., None])
    return y, squares


def _only_if(fits: Tensor, *parts: Tensor) -> Iterator[Tensor]:
    """Each part, or zeros where not ``fits``, in place; `where` would take ten times as long."""
    if are_all(fits):
        return iter(parts)
    return (part.nan_to_num_(0.0, 0.0, 0.0).mul_(fits) for part in parts)


def _without_rounding(squares: Tensor, count: int | Tensor, mean: Tensor) -> Tensor:
    """Centred squares, but 0 where they are the rounding of a constant: at unit norm that has huge gradients."""
    # Less, not at most: where both overflow nothing is known to be rounding.
    return torch.where(squares < _rounding_share(squares.dtype) * count * mean**2, 0.0, squares)


def _rounding_share(dtype: torch.dtype) -> float:
    # The second bound is that of raw moments that are added up in float64 over thousands of batches.
    return max((4 * torch.finfo(dtype).eps) ** 2, 1e-12)


def _centre(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the teacher's mean over neurons from both: distances stay, cancellation shrinks."""
    centre = x.mean(-2, keepdim=True)
    return y - centre, x - centre


def _squared_distances(y: Tensor, x: Tensor) -> Tensor:
    distances = _norms(y).square_()[..., None] + _norms(x).square_()[..., None, :]
    return _add_product(distances, y, x.mT, alpha=-2).clamp_min_(0)


def _product(matrix: Tensor, x: Tensor, like: Tensor | None = None) -> Tensor:
    """``matrix @ x`` in the memory layout of ``like``: row operations on two layouts are ten times slower."""
    if like is not None and like.mT.is_contiguous():
        return (x.mT @ matrix.mT).mT
    return matrix @ x


def _matrix_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix @ vector`` for each of a batch; not as a product of matrices, which is five times slower."""
    return matrix.mv(vector) if matrix.dim() == 2 else torch.bmm(matrix, vector[..., None]).squeeze(-1)


def _norms(y: Tensor) -> Tensor:
    """Norms of neurons ``(..., N)``, in one pass where a neuron lies in one piece."""
    return torch.linalg.vector_norm(y, dim=-1) if y.stride(-1) == 1 else torch.linalg.vecdot(y, y).sqrt_()


def _add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1) -> Tensor:
    """``total + alpha * left @ right``, in place."""
    return total.baddbmm_(left, right, alpha=alpha) if total.dim() == 3 else total.addmm_(left, right, alpha=alpha)


def _pull(pull: Tensor, matrix: Tensor, x: Tensor) -> Tensor:
    """``pull - matrix @ x``, in place."""
    if pull.dim() == 3 and not pull.is_contiguous():
        return pull.sub_(_product(matrix, x, like=pull))
    return _add_product(pull, matrix, x, alpha=-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ_ij a_ij b_ij; both in one layout."""
    if a.mT.is_contiguous():
        a, b = a.mT, b.mT
    return torch.linalg.vecdot(a.flatten(-2), b.flatten(-2))


def _count(y: Tensor) -> Tensor:
    return y.new_full(y.shape[:-2], y.shape[-1])


def _scale(energy: Tensor) -> Tensor:
    """s²; a teacher that is zero throughout has no scale of its own."""
    squares, count = energy.unbind(-1)
    scale = squares / count
    return torch.where(scale > 0, scale, 1.0)
