"""Neurons, costs and plans that the tests of the transport floor share, with oracles that nobody here wrote."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from lightning_otrt.transport.cost import Cost, Plan, Rounds, Sums, ValueAndGradient
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.sinkhorn import TOLERANCE

NAMES = ("correlation", "euclidean", "sqeuclidean")

OBSERVATIONS = 12

SHAPES = ((24, 24), (16, 40), (40, 16))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Neurons of different means and scales, as layers have them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    mean, scale = torch.randn((2, *shape[:-1], 1), generator=generator, dtype=torch.float64)
    return (values * scale.exp() + mean).to(dtype)


def draw_plan(*shape: int, seed: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    """A plan that has not converged: its masses are not uniform and it does not sum to 1."""
    plan = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (plan / (shape[-1] * shape[-2])).to(dtype)


def oracle(name: str, y: Tensor, x: Tensor) -> np.ndarray:
    """The cost of one pair in float64, by scipy."""
    student, teacher = y.double().numpy(), x.double().numpy()
    if name == "correlation":
        return cdist(student, teacher, "correlation")
    scale = np.sqrt((teacher**2).mean() * teacher.shape[1])
    return cdist(student, teacher) / scale if name == "euclidean" else cdist(student, teacher, "sqeuclidean") / scale**2


def matrix_of(cost: Cost, y: Tensor, x: Tensor) -> Tensor:
    return cost.matrix(cost.sums(y, x), cost.energy(x))


def value_of(cost: Cost, y: Tensor, x: Tensor, plan: Tensor) -> ValueAndGradient:
    return cost.value(y, x, Plan.of(plan), cost.energy(x))


def cloud(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cost_between(y: Tensor, x: Tensor, name: str = "euclidean") -> Tensor:
    cost = get_cost(name)
    return cost.matrix(cost.sums(y, x), cost.energy(x))


def random_cost(rows: int, columns: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cdist(cloud(batch, rows, 8, seed=1), cloud(batch, columns, 8, seed=2)).to(dtype)


def oracle_sinkhorn(cost: Tensor, epsilon: float, iterations: int = 5_000) -> Tensor:
    """Alternating log-domain Sinkhorn in float64 at a fixed ε, relative to the mean, until it stands still."""
    scaled = cost.double() / cost.double().mean((1, 2), keepdim=True)
    _, rows, columns = cost.shape
    g = scaled.new_zeros(scaled.shape[0], 1, columns)
    for _ in range(iterations):
        f = -epsilon * (torch.logsumexp((g - scaled) / epsilon, 2, keepdim=True) - math.log(columns))
        update = -epsilon * (torch.logsumexp((f - scaled) / epsilon, 1, keepdim=True) - math.log(rows))
        change, g = (update - g).abs().max().item(), update
        if change < 1e-12:
            break
    return ((f + g - scaled) / epsilon).exp() / (rows * columns)


def check_plan(plan: Tensor, rows: int, columns: int, error: float = TOLERANCE) -> None:
    assert plan.isfinite().all()
    assert (plan >= 0).all()
    assert not plan.requires_grad
    torch.testing.assert_close(plan.sum(-1), torch.full_like(plan.sum(-1), 1 / rows), rtol=1e-5, atol=0)
    assert (plan.sum(-2) - 1 / columns).abs().sum(-1).max() <= error * 1.01


def over_processes(cost: Cost, y: Tensor, x: Tensor, plan: Tensor, sizes: tuple[int, ...]) -> list[ValueAndGradient]:
    """Run one generator a process in lockstep; each is sent new tensors that sum what all of them yielded."""
    parts = list(zip(y.split(sizes, -1), x.split(sizes, -1), strict=True))
    rounds: list[Rounds] = [cost.shared_value(a, b, Plan.of(plan), cost.energy(b)) for a, b in parts]
    results: list[ValueAndGradient] = []
    asked: list[Sums] = [next(process) for process in rounds]
    while True:
        # Sent as clones: two processes share no memory, and a generator may work in place.
        total = [torch.stack(tensors).sum(0) for tensors in zip(*asked, strict=True)]
        asked = []
        for process in rounds:
            try:
                asked.append(process.send([tensor.clone() for tensor in total]))
            except StopIteration as stop:
                results.append(stop.value)
        if results:
            assert not asked, "the processes disagree about the number of rounds"
            return results
