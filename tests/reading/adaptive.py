"""Average pooling by torch, and the matrix of neurons written out as a loop: what readings are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ADAPTIVE: dict[int, Callable[[Tensor, Any], Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def columns(reading: Tensor) -> Tensor:
    """Neuron matrix of ``(B, C, *positions)``, written out as a loop."""
    rows = [[sample[neuron].flatten() for sample in reading] for neuron in range(reading.shape[1])]
    return torch.stack([torch.cat(row) for row in rows])
