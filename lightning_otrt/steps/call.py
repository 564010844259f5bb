"""What the engine gets in one call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Batch", "Call"]

#: Detached neurons ``(N, n)`` and ``(M, n)`` of one pair, for each forward (view) of a call. n is 0 where its layers
#: did not run.
Batch = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Call:
    """One call of the engine.

    Attributes:
        batches: The batch of each pair.
        counts: The observations of each pair in each view, on this process.
        samples: Number of samples in all views.
        absent: The pairs that ran in no view, whose lack of observations is no fault of the batch.
        is_new: Whether the batch enters the statistics, and plans that are due are solved.
    """

    batches: Sequence[Batch]
    counts: Sequence[Sequence[int]]
    samples: int
    absent: Collection[int]
    is_new: bool

    @property
    def device(self) -> torch.device:
        """Where the neurons of the student are."""
        return self.batches[0][0][0].device
