"""Neurons for the tests of the metric, and their exact distance by numpy and POT."""

from __future__ import annotations

from typing import Any

import numpy as np
import ot
import torch
from torch import Tensor

from lightning_otrt.analysis.metric import NeuronTransportDistance

N, M = 6, 9
COSTS = ("correlation", "euclidean", "sqeuclidean")
#: Uneven batches, one of them with too few observations for a correlation of its own, one empty.
SIZES = (32, 5, 2, 0, 64, 17)


def neurons(observations: int, seed: int = 0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(M, observations, generator=generator, dtype=torch.float64)
    student = teacher[:N].flip(0) + 0.5 * torch.randn(N, observations, generator=generator, dtype=torch.float64)
    return (student + offset).float(), (teacher + offset).float()


def batches(sizes: tuple[int, ...] = SIZES, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    student, teacher = neurons(sum(sizes), **kwargs)
    return list(zip(student.split(sizes, 1), teacher.split(sizes, 1), strict=True))


def double(**kwargs: Any) -> NeuronTransportDistance:
    """A metric whose value is not rounded to float32."""
    metric = NeuronTransportDistance(N, M, **kwargs)
    metric.set_dtype(torch.float64)
    return metric


def cost_matrix(student: Tensor, teacher: Tensor, cost: str) -> np.ndarray:
    """The definitions of the costs, by numpy and POT."""
    y, x = student.double().numpy(), teacher.double().numpy()
    if cost == "correlation":
        return 1 - np.corrcoef(y, x)[: len(y), len(y) :]
    squared = ot.dist(y, x, metric="sqeuclidean") / (y.shape[1] * np.mean(x**2))
    return np.sqrt(squared) if cost == "euclidean" else squared


def exact_distance(student: Tensor, teacher: Tensor, cost: str) -> float:
    return float(ot.emd2([], [], cost_matrix(student, teacher, cost)))
