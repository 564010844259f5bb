"""Attaches gradients that are known in closed form to a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["attach_gradients"]


class _RaiseOnSecondDerivative(torch.autograd.Function):
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


class _ValueWithGradients(torch.autograd.Function):
    """A value that was computed beforehand, together with its gradients."""

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
            # Only if needed: autograd copies a view where it accumulates gradients.
            grad = grad if grad.shape == shape else grad.reshape(shape)
            # Gradients are enabled here under `create_graph=True`. `once_differentiable` would not raise if the
            # incoming gradient is a constant.
            grads.append(_RaiseOnSecondDerivative.apply(grad, anchor) if torch.is_grad_enabled() else grad)
        return (None, None, *grads, *[None] * (2 * count))


def attach_gradients(
    value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor], factors: Sequence[float] | None = None
) -> Tensor:
    """``value`` as a function of ``inputs`` with the given gradients.

    Args:
        value: A scalar, or one value for each of a batch ``(B,)``.
        inputs: What it depends on; each ``(..., N, n)``, or ``(B, ..., N, n)`` with a batch of values.
        gradients: The gradient for each input.
        factors: A factor of each gradient; 1 by default.

    Returns:
        A tensor equal to ``value``. It can be differentiated once: a second derivative raises a RuntimeError.

    Example:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> attach_gradients(torch.tensor(9.0), [x], [torch.tensor([6.0])], [0.5]).backward()
        >>> x.grad
        tensor([3.])
    """
    # Empty tensors connect the gradients to the inputs, where a second derivative must raise, and keep no input alive.
    anchors = [tensor[..., :0].clone() for tensor in inputs]
    factors = [1.0] * len(inputs) if factors is None else factors
    return _ValueWithGradients.apply(value, factors, *inputs, *anchors, *gradients)
