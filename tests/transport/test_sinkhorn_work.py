"""What a Sinkhorn solve costs: operations, and whether it can be captured in a graph."""

from __future__ import annotations

import pytest
import torch
from engines import COSTS
from operations import operations
from torch import Tensor

from lightning_otrt.transport.geomloss_loop import annealing
from lightning_otrt.transport.named_costs import get_cost
from lightning_otrt.transport.sinkhorn import sinkhorn_plan


@pytest.mark.parametrize(("start", "limit"), [("cold", 170), ("warm", 80)])
def test_operations_of_an_iteration(start: str, limit: int) -> None:
    cost = torch.rand(2, 24, 20)
    potential = None if start == "cold" else torch.zeros(2, 20)
    counts = [
        sum(operations(lambda n=n: sinkhorn_plan(cost, 0.01, potential=potential, iterations=n)).counts.values())
        for n in (4, 9)
    ]
    assert (counts[1] - counts[0]) / 5 <= 25
    assert counts[0] <= limit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_plan_solve_is_captured_in_a_cuda_graph() -> None:  # pragma: no cover - needs a GPU
    cost, start = torch.rand(2, 64, 48, device="cuda"), torch.zeros(2, 48, device="cuda")
    sinkhorn_plan(cost, 0.01, potential=start, iterations=8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = sinkhorn_plan(cost, 0.01, potential=start, iterations=8)
    cost.copy_(torch.rand_like(cost))
    graph.replay()
    torch.testing.assert_close(result.matrix, sinkhorn_plan(cost, 0.01, potential=start, iterations=8).matrix)


def test_shapes_of_the_solve_depend_on_no_value() -> None:
    """Fake tensors hold no values: what runs on them can be captured in a graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        result = sinkhorn_plan(torch.rand(2, 24, 20), 0.01, iterations=8)
        warm = sinkhorn_plan(torch.rand(2, 24, 20), 0.01, potential=result.potential, iterations=8)
    assert result.matrix.shape == warm.matrix.shape == (2, 24, 20)


@pytest.mark.parametrize("cloud", ["permuted", "independent"])
@pytest.mark.parametrize("cost", COSTS)
def test_warm_start(cloud: str, cost: str) -> None:
    """From the potential of a student one step before: two iterations, or half as many as from nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 256, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    y = x[torch.randperm(128, generator=generator)] + 0.3 * noise if cloud == "permuted" else noise
    rule = get_cost(cost)
    moved = y + 0.05 * torch.randn(y.shape, generator=generator)
    before, after = (rule.matrix(rule.sums(side, x), rule.energy(x))[None] for side in (y, moved))
    potential = sinkhorn_plan(before, 0.01, iterations=40).potential

    def needed(start: Tensor | None) -> int:
        errors = (sinkhorn_plan(after, 0.01, potential=start, iterations=n).marginal_error.item() for n in range(1, 99))
        return next(n for n, error in enumerate(errors, 1) if error <= 1e-2)

    cold = needed(None) + len(annealing(0.01))
    assert needed(potential) <= (2 if cloud == "permuted" else cold / 2)
