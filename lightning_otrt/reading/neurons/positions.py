"""Bringing the readings of two layers to the same positions, so that their observations are paired one to one."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_otrt.reading.neurons.pooling import pool

__all__ = ["as_matrix", "can_be_compared", "has_one_position", "match_positions"]


def match_positions(student: Tensor, teacher: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Bring two readings ``(B, C, *positions)`` to the same positions: the smaller of the two along each axis.

    Args:
        student: ``(B, N, *positions)``.
        teacher: ``(B, M, *positions)``. A vector ``(B, M)`` counts as a single position.
        where: How errors name the pair.

    Returns:
        Neuron matrices ``(N, n)`` and ``(M, n)`` whose columns are the same observations.

    Raises:
        ValueError: If the samples differ in number or the positions cannot be paired.

    Example:
        >>> import torch
        >>> y, x = match_positions(torch.zeros(8, 3, 4, 4), torch.zeros(8, 5, 2, 2), "'a' -> 'b'")
        >>> y.shape, x.shape
        (torch.Size([3, 32]), torch.Size([5, 32]))
    """
    shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)} as (batch, neurons, *positions)"
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{where}: the batch sizes differ ({shapes}). Observations are paired one to one, so teacher and student "
            "must see the same samples. Check `teacher_inputs` and layers that fold positions into the batch."
        )
    if student.shape[2:] == teacher.shape[2:]:
        return as_matrix(student), as_matrix(teacher)
    if has_one_position(student) and has_one_position(teacher):  # a map and a sequence, as with `grid=1`
        return as_matrix(student), as_matrix(teacher)
    if student.dim() == 2 or teacher.dim() == 2:
        spatial = teacher if student.dim() == 2 else student
        pooled = pool(spatial, (1,) * (spatial.dim() - 2)).flatten(1)
        student, teacher = (student, pooled) if student.dim() == 2 else (pooled, teacher)
        return as_matrix(student), as_matrix(teacher)
    if student.dim() != teacher.dim():
        raise ValueError(
            f"{where}: the positions cannot be paired ({shapes}): one side is a map and the other a sequence. "
            "Pair layers of the same kind, or 'penultimate', which has no positions, or pass grid=1, which compares "
            "means over all positions."
        )
    sizes = tuple(map(min, student.shape[2:], teacher.shape[2:]))
    return as_matrix(pool(student, sizes)), as_matrix(pool(teacher, sizes))


def can_be_compared(student: Tensor, teacher: Tensor) -> bool:
    """Whether two readings ``(B, C, *positions)`` have positions that can be paired: not a map with a sequence."""
    are_single = has_one_position(student) and has_one_position(teacher)
    return are_single or student.dim() == teacher.dim() or 2 in (student.dim(), teacher.dim())


def has_one_position(reading: Tensor) -> bool:
    """Whether a reading ``(B, C, *positions)`` has a single position; its shape tells, so no sample is needed."""
    return math.prod(reading.shape[2:]) == 1


def as_matrix(reading: Tensor) -> Tensor:
    """``(B, C, *positions)`` to ``(C, B * positions)``."""
    return reading.transpose(0, 1).flatten(1)
