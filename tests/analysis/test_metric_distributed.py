"""The metric over two processes: uneven batches, a process without data, and no collective after ``compute``."""

from __future__ import annotations

import tempfile
import warnings

import pytest
import torch
from analysis.metric_problem import COSTS, SIZES, batches, double, exact_distance, neurons
from torchmetrics import MetricCollection
from torchmetrics.utilities.exceptions import TorchMetricsUserError


def _worker(rank: int, folder: str) -> None:
    """Two processes: uneven numbers of uneven batches, then one process without any."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for cost in COSTS:
            for share in ([0, 1, 0, 0, 0, 1], [0] * len(SIZES)):
                metric = double(cost=cost, plan="exact")
                for (student, teacher), owner in zip(batches(offset=100.0), share, strict=True):
                    if owner == rank:
                        metric.update(student, teacher)
                local = metric.sums.clone()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*was called before the ``update`` method")
                    value = metric.compute().item()
                assert abs(value - exact_distance(*neurons(sum(SIZES), offset=100.0), cost)) < 1e-8
                assert torch.equal(metric.sums, local), "the state is that of this process again"
                if rank == 0:
                    # A collective here would wait for the other process for ever.
                    assert abs(metric.transport().value.item() - value) < 1e-12

        both = double(plan="exact")
        both.update(*batches((40, 30))[rank])
        with both.sync_context():
            assert both.sums[0] == 70, "the statistics of both"
            with pytest.raises(TorchMetricsUserError, match="already been synced"):
                both.sync()
        assert both.sums[0] == (40, 30)[rank]
        collection = MetricCollection(
            {"exact": double(plan="exact"), "random": double(plan="random"), "euclidean": double(cost="euclidean")}
        )
        for student, teacher in batches((20, 20, 20, 10))[rank::2]:
            collection.update(student, teacher)
        found = collection.compute()
        assert abs(found["exact"].item() - exact_distance(*neurons(70), "correlation")) < 1e-8

        stepwise = double(plan="exact", dist_sync_on_step=True)
        student, teacher = batches((40, 30))[rank]
        assert abs(stepwise(student, teacher).item() - exact_distance(*neurons(70), "correlation")) < 1e-8
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, args=(folder,), nprocs=2)
