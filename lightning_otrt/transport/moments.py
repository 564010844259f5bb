"""Moments of neurons over their observations, and which neurons are dead.

The difficulty is a neuron that is constant on the batch. Its correlation is 0 / 0, and what rounding leaves of its
variance must not be taken for activity. The moments here tell the two apart.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from lightning_otrt.transport.cost import Sums
from lightning_otrt.transport.tensors import all_nonzero, means, norms, widest

__all__ = [
    "DEAD_SHARE",
    "around_mean",
    "centred",
    "centred_over_processes",
    "centred_squares",
    "deviations",
    "inverse_norm",
    "moments",
    "reciprocal_norm",
    "without_means",
    "without_rounding",
]

#: A neuron whose centred norm is below this share of its layer's mean norm carries no correlation: it is *dead*.
DEAD_SHARE = 1e-3
#: Share of the squared mean below which a variance is rounding error: a bound for a batch in float32, and for raw
#: moments that are added up in float64 over thousands of batches.
ROUNDING_SHARE = 1e-12


def inverse_norm(norm: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors: 1 / norm of live neurons and 0 of dead ones; 1 for dead neurons and 0 for live ones."""
    inverse = reciprocal_norm(norm)
    return inverse, (inverse == 0).to(norm.dtype)


def centred(y: Tensor) -> tuple[Tensor, Tensor]:
    """Neurons without their means, and 1 / norm of live neurons and 0 of those that are dead or constant."""
    y, norm, rounding = _around_own_mean(y)
    return y, reciprocal_norm(norm, rounding)


def without_means(y: Tensor) -> Tensor:
    """Neurons without their means; those whose deviations are rounding error are 0."""
    y, norm, rounding = _around_own_mean(y)
    varies = norm.gt(rounding)
    if not all_nonzero(varies):
        y.mul_(varies[..., None])
    return y


def _around_own_mean(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Neurons without their means, their norms, and the norms up to which those are rounding error."""
    mean = means(y)
    y = y - mean
    return y, norms(y), mean.squeeze(-1).abs_().mul_((ROUNDING_SHARE * y.shape[-1]) ** 0.5)


def reciprocal_norm(norm: Tensor, rounding: Tensor | None = None) -> Tensor:
    """1 / norm of live neurons and 0 of dead ones; those are dead, too, whose norm is at most ``rounding``."""
    average = norm.mean(-1, keepdim=True)
    # If one norm is infinite this makes all of them NaN. Otherwise all other neurons would count as dead.
    norm = torch.add(norm, average, alpha=0)
    least = average.mul_(DEAD_SHARE)
    dead = norm <= (least if rounding is None else torch.maximum(rounding, least))
    return norm.reciprocal_().masked_fill_(dead, 0.0)


def centred_squares(y: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, means ``(..., N, 1)`` and sums of squares around them; zeros where there are no observations."""
    mean = y.sum(-1, keepdim=True) / max(y.shape[-1], 1)
    return y.shape[-1], mean, without_rounding(norms(y - mean).square_(), y.shape[-1], mean.squeeze(-1))


def around_mean(count: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """Sums of squares around the means, from the moments around any point; 0 if they are rounding error."""
    mean = total / count
    return without_rounding(squares - total * mean, count, mean).clamp_min(0)


def centred_over_processes(
    y: Tensor, x: Tensor
) -> Generator[Sums, Sums, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Centre the neurons of two layers by their means on all processes: one round of vectors.

    Returns:
        For each layer, its neurons on this process and their norms over all processes.
    """
    count, mean_y, mean_x = y.shape[-1], means(y), means(x)
    y, x = y - mean_y, x - mean_x
    squares_y, squares_x = torch.linalg.vecdot(y, y), torch.linalg.vecdot(x, x)
    # Processes have different means, so moments are exchanged: in float64, where their cancellation is harmless.
    all_y, all_x = yield [moments(count, mean_y, squares_y), moments(count, mean_x, squares_x)]
    shift_y, squares_y = _recentre(all_y, mean_y)
    shift_x, squares_x = _recentre(all_x, mean_x)
    return (y.add_(shift_y), squares_y.sqrt()), (x.add_(shift_x), squares_x.sqrt())


def moments(count: int, mean: Tensor, squares: Tensor) -> Tensor:
    """Count, sum and sum of squares ``(..., N, 3)`` from a mean and centred squares; in the widest type."""
    mean = mean.squeeze(-1).to(widest(mean))
    return torch.stack((torch.full_like(mean, count), count * mean, count * mean**2 + squares), -1)


def _recentre(total: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The shift from neurons centred by ``mean`` to neurons centred by the mean of all, and their centred squares."""
    count, sums, squares = total.unbind(-1)
    overall = sums / count
    centred = (squares - count * overall**2).clamp_min(0).to(mean.dtype)
    shift = (mean.to(widest(mean)) - overall[..., None]).to(mean.dtype)
    return shift, without_rounding(centred, count.to(mean.dtype), overall.to(mean.dtype))


def deviations(y: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Deviations from ``reference`` and their sums of squares, both 0 if they are rounding error."""
    y = y - reference
    squares = without_rounding(norms(y).square_(), y.shape[-1], reference.squeeze(-1))
    if not all_nonzero(squares):
        # `masked_fill_` takes ten times as long.
        y.mul_((squares != 0)[..., None])
    return y, squares


def without_rounding(squares: Tensor, count: int | Tensor, mean: Tensor) -> Tensor:
    """Centred squares, with 0 for a constant neuron: scaled to unit norm, its rounding error has huge gradients."""
    # Strictly less: if both sides overflow, nothing says that the squares are rounding error.
    return torch.where(squares < ROUNDING_SHARE * count * mean**2, 0.0, squares)
