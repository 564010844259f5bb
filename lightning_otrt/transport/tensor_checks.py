"""Checks of tensors that raise. All that look at values wait for the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_otrt.transport.tensors import finite

__all__ = ["check_cost", "check_finite", "check_floating", "check_values"]


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise a ValueError that names ``where`` if a value is NaN or infinite.

    Example:
        >>> check_finite(torch.zeros(3), "Student layer 'head'")
    """
    # A sum is much faster than a test of each value; only if it overflows is that test needed.
    if not math.isfinite(tensor.sum().item()) and (bad := int((~torch.isfinite(tensor)).sum())):
        raise ValueError(
            f"{where} has {bad} NaN or infinite values of {tensor.numel()} (shape {tuple(tensor.shape)}), so no "
            "transport cost can be formed. Check its inputs and its weights."
        )


def check_floating(name: str, value: object) -> None:
    """Raise a TypeError unless the argument ``name`` is a floating-point tensor.

    Example:
        >>> check_floating("student", torch.zeros(3))
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"Expected argument `{name}` to be a floating-point tensor, but got {got}.")


def check_values(tensor: Tensor, where: str) -> None:
    """Raise a ValueError that names ``where`` if values are not finite, or their squares overflow or vanish."""
    # One pass tells whether anything is wrong; what it is matters only then.
    norm = torch.linalg.vector_norm(tensor).item()
    if not math.isfinite(norm):
        check_finite(tensor, where)
        problem = "overflow"
    elif norm < (torch.finfo(tensor.dtype).tiny * tensor.numel()) ** 0.5 and bool(tensor.any()):
        problem = "vanish in"
    else:
        return
    raise ValueError(
        f"{where} has values as large as {tensor.abs().max():.3g}, whose squares {problem} {tensor.dtype}, so no "
        "transport cost can be formed. Normalise the activations, or pass them in float64."
    )


def check_cost(matrix: Tensor, cost: object) -> None:
    """Raise a ValueError that names ``cost`` if its matrix has values that are not finite or negative."""
    # A mean is finite only if all values are.
    if not bool(finite(matrix.mean((-2, -1))).all()):
        check_finite(matrix, f"The cost {cost!r}")
        raise ValueError(
            f"Expected the cost {cost!r} to have a finite mean, to which epsilon is relative, but its values go up to "
            f"{matrix.max():.3g} and overflow {matrix.dtype}. Scale the cost."
        )
    if matrix.min().item() < 0:
        raise ValueError(
            f"Expected the cost {cost!r} not to be negative, but its smallest value is {matrix.min():.3g}. Epsilon is "
            "relative to the mean cost. Add a constant to the cost."
        )
