"""Numbers that describe a transport plan."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Diagnostics", "diagnose"]


class Diagnostics(NamedTuple):
    """Figures of plans ``(..., N, M)``; each has the shape ``(...)``.

    Attributes:
        student_error: L1 distance of the row sums to 1/N, of a total mass of 1.
        teacher_error: L1 distance of the column sums to 1/M.
        entropy: Entropy of the plan over that of the uniform plan: 1 matches nothing; an assignment of N = M neurons
            has 1/2.
        off_identity: Share of the mass off the diagonal for equal widths, that is, how many neurons were reordered.
            NaN for different widths.
    """

    student_error: Tensor
    teacher_error: Tensor
    entropy: Tensor
    off_identity: Tensor


def diagnose(plan: Tensor) -> Diagnostics:
    """Diagnostics of plans ``(..., N, M)``.

    Example:
        >>> round(diagnose(torch.eye(4) / 4).entropy.item(), 3)
        0.5
    """
    rows, columns = plan.shape[-2:]
    total = plan.sum((-2, -1))
    diagonal = plan.diagonal(dim1=-2, dim2=-1).sum(-1)
    return Diagnostics(
        student_error=(plan.sum(-1) - 1 / rows).abs().sum(-1),
        teacher_error=(plan.sum(-2) - 1 / columns).abs().sum(-1),
        # A single neuron on each side has no entropy to compare with.
        entropy=torch.special.entr(plan).sum((-2, -1)) / (math.log(rows * columns) or 1.0),
        off_identity=1 - diagonal / total if rows == columns else torch.full_like(total, math.nan),
    )
