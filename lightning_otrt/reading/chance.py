"""The distance of two layers by chance: that to the teacher's layer on other samples."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MIN_SAMPLES", "OtherSamples", "relative_to_chance"]

#: Fewest samples for a distance by chance: with one there is no other sample.
MIN_SAMPLES = 2
#: A smaller distance is only the blur of an entropic plan.
_NOTHING = 1e-3


class OtherSamples:
    """Replaces each sample of a reading by the one before it, and the first of a batch by the last; positions stay.

    Of a batch with a single sample it is the last one of the batch before. The first such batch has no other sample.

    Example:
        >>> import torch
        >>> others = OtherSamples()
        >>> others("layer", torch.tensor([[1.0], [2.0], [3.0]])).flatten().tolist()
        [3.0, 1.0, 2.0]
        >>> others("layer", torch.tensor([[4.0]])).item()
        3.0
    """

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}

    def __call__(self, layer: str, reading: Tensor) -> Tensor | None:
        """The reading ``(B, C, *positions)`` with other samples; None where there is none."""
        before = self._last.get(layer)
        self._last[layer] = reading[-1:]
        if len(reading) >= MIN_SAMPLES:
            return reading.roll(1, 0)
        return before if before is not None and before.shape == reading.shape else None


def relative_to_chance(distances: Tensor, chance: Tensor) -> Tensor:
    """Distances divided by those with other samples: 0 for equal layers, 1 for layers that share nothing of a sample.

    Distances by chance differ between layers: they are small for wide layers, for few observations, and where zero
    padding shows at the border of each map. The ratios can be compared. Where both distances are zero, as for layers
    that do not depend on the sample, the ratio is 1.

    Args:
        distances: Distances of layers that see the same samples.
        chance: Distances of the same shape, with other samples on one side.

    Example:
        >>> relative_to_chance(torch.tensor([0.0, 0.2, 0.0]), torch.tensor([0.8, 0.8, 0.0]))
        tensor([0.0000, 0.2500, 1.0000])
    """
    shared = (chance < _NOTHING) & (distances < _NOTHING)
    return torch.where(shared, torch.ones_like(chance), distances / chance.clamp(min=_NOTHING))
