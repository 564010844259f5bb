"""Whether a task trains a softmax of the logits, as far as the gradient of its loss shows it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_otrt.notices import warn

__all__ = ["TaskGradient"]

#: A larger share of the gradient than this is no rounding, and no small penalty beside a cross-entropy.
UNLIKE_SOFTMAX = 0.05
#: Calls that are looked at, until one has a finite gradient: the first ones with a GradScaler may overflow.
_TRIES = 3
#: Logarithms of a softmax are those of probabilities whose sum is 1 up to about this, also in types of two bytes.
_OF_ROUNDING = 1e-2
#: The distillation takes one softmax from another, each of sum 1. Of equal ones so many units of rounding may be left.
_UNITS_LEFT = 64


class TaskGradient:
    r"""Looks at the gradient of the logits in the first backward pass.

    A softmax stays the same when all logits of a sample rise by one number. So the gradient of a loss of a softmax sums
    to 0 over the classes of each sample: :math:`q - p` for a cross-entropy with any targets p, and likewise with class
    weights, smoothed labels or a focal factor. That of a binary cross-entropy or of a squared error does not. The
    gradient of the distillation itself sums to 0, too, and can stay in. If a network returns the logarithm of a
    softmax, the gradient of that need not sum to 0. It tells nothing and is left out.

    A student that is a copy of its teacher has only rounding errors as gradient of the distillation, whose sum is of
    their own size. So what the rounding of :math:`q - p` may leave is taken off, in float32, in which it is computed.
    Where the whole gradient is no larger, nothing is known yet.

    The sums stay on the device until :meth:`take`.

    Example:
        >>> logits, look = torch.randn(4, 3, requires_grad=True), TaskGradient()
        >>> look.watch([(logits, 1)])
        >>> logits.sigmoid().sum().backward()
        >>> look.take()
        1.0
    """

    def __init__(self) -> None:
        self._tries = _TRIES
        #: Over samples, the size of the sum over classes, the sum of sizes, and what rounding may leave of both; None
        #: where nothing is watched.
        self._sums: Tensor | None = None

    def watch(self, logits: Sequence[tuple[Tensor, int]]) -> None:
        """Look at the next backward pass, if none has told yet.

        Args:
            logits: What the student returned in each forward of a call, with the axis of the classes.
        """
        watched = [(tensor, axis) for tensor, axis in logits if tensor.requires_grad]
        if not self._tries or not watched or torch.compiler.is_compiling():
            return
        self._tries -= 1
        self._sums = sums = watched[0][0].new_zeros(3, dtype=torch.float32)
        for tensor, axis in watched:
            values = tensor.detach().float()
            is_logarithm = (torch.logsumexp(values, axis).abs() < _OF_ROUNDING).all()
            tensor.register_hook(_Add(sums, axis, is_logarithm))  # type: ignore[no-untyped-call]

    def watch_term(self, term: Tensor, temperature: float) -> None:
        """Look at the gradient of the distillation too, which tells how large its parts at the logits are.

        Args:
            term: The mean over positions of what the logits give.
            temperature: T. The gradient of the logits of a position is T (q - p), over the number of positions.
        """
        if self._sums is not None and term.requires_grad and not torch.compiler.is_compiling():
            rounding = 2 * temperature * _UNITS_LEFT * torch.finfo(torch.float32).eps
            term.register_hook(_AddRounding(self._sums, rounding))  # type: ignore[no-untyped-call]

    def check(self) -> None:
        """Warn once where the gradient of an earlier call shows that the task trains no softmax."""
        left = self.take()
        if left is not None and left > UNLIKE_SOFTMAX:
            warn(
                "`distillation` compares the softmax over all outputs of the networks, but the task seems to train "
                "none: over the classes of a sample the gradients of the outputs sum to 0 for a cross-entropy, and to "
                f"{left:.0%} of their size here. For labels that do not exclude each other (binary cross-entropy) pass "
                "distillation=LogitDistillation(activation='sigmoid'), which compares each by itself. For a regression "
                "leave it out, or let the teacher's outputs be regressed on a layer of the student: "
                "LogitDistillation(features='name of the layer'). Where the outputs are classes and have another loss, "
                "too, LogitDistillation(activation='softmax') says that it is meant.",
            )

    def take(self) -> float | None:
        """How much of the gradient is left in its sum over classes, from 0 to 1: once, and None before it is known."""
        if self._sums is None:
            return None
        left, whole, rounding = _read(self._sums)
        self._sums = None
        if not (whole > rounding and math.isfinite(whole) and math.isfinite(left)):
            return None
        self._tries = 0
        return max(left - rounding, 0.0) / whole


def _read(sums: Tensor) -> tuple[float, float, float]:
    """All numbers on the host, which waits for the device."""
    left, whole, rounding = sums.tolist()
    return left, whole, rounding


class _Add:
    """Tensor hook that adds to the sums."""

    def __init__(self, sums: Tensor, axis: int, is_logarithm: Tensor) -> None:
        self.sums, self.axis, self.is_logarithm = sums, axis, is_logarithm

    def __call__(self, gradient: Tensor) -> None:
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            wide = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
            limits = torch.finfo(gradient.dtype)
            # In float16 without a GradScaler small gradients are rounded to 0, which alone leaves a sum.
            lost = limits.smallest_normal * limits.eps * gradient.shape[self.axis]
            left = (wide.sum(self.axis).abs() - lost).clamp_min(0) * ~self.is_logarithm
            self.sums[:2] += torch.stack([left.sum(), wide.abs().sum()]).to(self.sums)


class _AddRounding:
    """Tensor hook of the distillation that adds what rounding may leave at the logits."""

    def __init__(self, sums: Tensor, rounding: float) -> None:
        self.sums, self.rounding = sums, rounding

    def __call__(self, gradient: Tensor) -> None:
        with torch.no_grad():
            self.sums[2] += (gradient.detach().abs() * self.rounding).to(self.sums)
