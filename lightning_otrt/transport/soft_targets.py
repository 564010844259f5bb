"""Distillation of logits: the teacher's softened classes as targets (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

__all__ = ["SoftTargets", "as_two_classes", "logit_neurons", "soft_targets"]

#: A class counts as masked only if each of its logits is negative, and its size is at least this many times that of the
#: largest logit of all classes, and of 1.
HUGE = 1000.0
#: The logits of a masked class may differ by this share of their size.
SAME_VALUE = 1e-6
#: Below this a series gives exp(v) - 1 - v with more digits than its three terms.
NEAR = 0.03
#: From this on the exponential of a difference of logits, divided by T, is not taken.
FAR = 30.0


class SoftTargets(NamedTuple):
    """A sum over positions, which adds over views and processes.

    Attributes:
        total: T² KL(teacher, student), summed over positions; differentiable.
        positions: Number of positions.
    """

    total: Tensor
    positions: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean over positions; 0 where there are none."""
        return self.total / self.positions.clamp_min(1)


def soft_targets(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, mask: Tensor | None = None
) -> SoftTargets:
    r"""T² KL of the student's softened classes from the teacher's, for each position.

    .. math:: T^2 \sum_k p_k \log \frac{p_k}{q_k}, \quad p = \mathrm{softmax}(t / T), \quad q = \mathrm{softmax}(s / T)

    The factor T² keeps the size of the gradient the same for every T (arXiv 1503.02531, section 2).

    Args:
        student: Logits ``(B, K, *positions)``. Computed in float32 or wider.
        teacher: Logits of the same shape; a constant.
        temperature: T, greater than 0.
        mask: True where a position counts, ``(B, *positions)``; None counts all.

    Raises:
        ValueError: If shapes do not fit or the temperature is not positive.

    Example:
        >>> import torch
        >>> from lightning_otrt.transport.soft_targets import soft_targets
        >>> logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
        >>> bool(soft_targets(logits + 3, logits).mean.abs() < 1e-6)
        True
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"Expected argument `temperature` to be positive and finite, but got {temperature!r}.")
    if student.shape != teacher.shape:
        raise ValueError(
            f"Expected the logits of student and teacher to have one shape, but got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. Where their classes differ, use the regression of the teacher's logits."
        )
    with torch.autocast(student.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        student, teacher = student.to(dtype), teacher.detach().to(dtype)
        if mask is not None:
            _check_mask(mask, (student.shape[0], *student.shape[2:]))
            # Before the softmax: padding may hold values that are not finite, which would reach the gradient.
            student, teacher = (torch.where(mask.unsqueeze(1), side, 0.0) for side in (student, teacher))
        own, target = log_softmax(student / temperature, 1), log_softmax(teacher / temperature, 1)
        each = kl_div(own, target, reduction="none", log_target=True).sum(1)
        total = each.sum()
        with torch.no_grad():
            value = _divergence((student - teacher) / temperature, target, each).sum()
        # The gradient of the sum, whose value has rounding errors. What overflows stays infinite.
        total = torch.where(total.isfinite(), value + (total - total.detach()), total)
        positions = total.new_full((), own.numel() / own.shape[1]) if mask is None else mask.sum().to(dtype)
        return SoftTargets(total * temperature**2, positions)


def _divergence(difference: Tensor, target: Tensor, otherwise: Tensor) -> Tensor:
    """The divergence at each position, with all digits also where student and teacher are close.

    For a large T both sums over classes are nearly equal, and their difference in float32 is rounding error. With the
    differences d of the logits around their mean it is log Σ p exp(d) = log(1 + Σ p (exp(d) - 1 - d)).

    Args:
        difference: Logits of the student less those of the teacher, divided by T.
        target: Logarithms of the teacher's probabilities p.
        otherwise: The divergence where differences are so large that their exponential may overflow.
    """
    weights = target.exp()
    difference = difference - (weights * difference).sum(1, keepdim=True)
    curved = torch.where(difference.abs() < NEAR, _series(difference), difference.expm1() - difference)
    return torch.where(difference.amax(1) < FAR, (weights * curved).sum(1).log1p(), otherwise)


def _series(values: Tensor) -> Tensor:
    """exp(v) - 1 - v of small values, by the terms of its series up to the sixth power."""
    series = 1 + values / 6
    for divisor in (5, 4, 3):
        series = 1 + values / divisor * series
    return values.square() / 2 * series


def as_two_classes(logits: Tensor) -> Tensor:
    """Logits of labels ``(B, K, *positions)`` as those of "yes" and "no" ``(B, 2, K, *positions)``.

    Their softmax is the sigmoid and what it lacks to 1.

    Example:
        >>> import torch
        >>> as_two_classes(torch.tensor([[0.0, 3.0]])).softmax(1)[:, 0]
        tensor([[0.5000, 0.9526]])
    """
    return torch.stack([logits, torch.zeros_like(logits)], 1)


def logit_neurons(logits: Tensor, *, centred: bool = True) -> Tensor:
    """Logits ``(K, *positions)`` as neurons ``(K, n)`` for a regression.

    Classes that are masked, by one huge negative value at all positions, are 0 and have no part in the mean: beside
    a mean of -1e9 nothing would be left of the others in float32.

    Args:
        logits: The logits.
        centred: Take the mean over classes away, which the softmax ignores.

    Example:
        >>> import torch
        >>> from lightning_otrt.transport.soft_targets import logit_neurons
        >>> logit_neurons(torch.tensor([[1.0, 5.0], [3.0, 5.0], [-1e9, -1e9]]))
        tensor([[-1.,  0.],
                [ 1.,  0.],
                [ 0.,  0.]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(1)
    if 0 in logits.shape:
        return logits
    is_masked = _masked_classes(logits)
    logits = torch.where(is_masked, 0.0, logits)
    if not centred:
        return logits
    mean = logits.sum(0) / (~is_masked).sum().clamp_min(1)
    return torch.where(is_masked, 0.0, logits - mean)


def _masked_classes(logits: Tensor) -> Tensor:
    """Whether each class of ``(K, n)`` has one huge negative value alone, ``(K, 1)``; known on the device."""
    lowest, highest = torch.aminmax(logits, dim=1, keepdim=True)
    # Means over positions of one value differ by rounding.
    is_constant = highest - lowest <= SAME_VALUE * lowest.abs()
    return is_constant & (highest <= -HUGE * logits.amax().abs().clamp_min(1))


def _check_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"Expected argument `mask` to be a boolean tensor of the shape {shape}, that of the logits without "
            f"their class axis, but got {mask.dtype} of the shape {tuple(mask.shape)}."
        )
