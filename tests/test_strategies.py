"""Representation transfer under Lightning's strategies: the weights that one process with the whole batch would give."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy
from processes import free_port, run_processes
from test_distributed import LAYERS, assert_close, batch, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_otrt import OTRTCallback, OTRTModule, RepresentationTransfer
from lightning_otrt.strategies import shared_batch

OPTIONS = {"memory": 0.9, "solve_every": 3, "weight": 2.0}
#: Steps and micro-batches of each fit.
STEPS, ACCUMULATE = 5, 2
ROOT = Path(__file__).parents[1]


class Batches(IterableDataset[Any]):
    """The part of each batch that belongs to a process; all of it for a single one."""

    def __init__(self, sizes: Sequence[int], alone: bool = False) -> None:
        self.sizes, self.alone = list(sizes), alone

    def __iter__(self) -> Iterator[Any]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for call in range(STEPS * ACCUMULATE):
            x, y = batch(call, self.sizes)
            yield (x, y) if self.alone else (x.split(self.sizes)[rank], y.split(self.sizes)[rank])


class Task(pl.LightningModule):
    """Cross-entropy summed so that the average over processes is that of the whole batch."""

    def __init__(self, sizes: Sequence[int], alone: bool = False, sharded: bool = False) -> None:
        super().__init__()
        self.net = net(4, seed=1)
        self.share = (1 if alone else len(sizes)) / sum(sizes)
        self.sharded = sharded
        self.dies_at = -1

    def configure_model(self) -> None:
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]
            for name in ("0", "3"):
                fully_shard(self.net.get_submodule(name), mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.dies_at and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="sum") * self.share

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class PlainTask(Task):
    """Without ``configure_model``, whose presence changes when layers are hooked."""

    configure_model = pl.LightningModule.configure_model


def make_trainer(**options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "accumulate_grad_batches": ACCUMULATE,
        "max_steps": STEPS,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 3,
    }
    return pl.Trainer(**{**defaults, **options})


def fit(sizes: Sequence[int], cost: str, wrap: bool = False, alone: bool = False, **options: Any) -> list[Tensor]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sharded = isinstance(options.get("strategy"), ModelParallelStrategy)
    task = (Task if sharded else PlainTask)(sizes, alone, sharded)
    teacher = net(6, seed=2)
    layers = {f"net.{name}": other for name, other in LAYERS.items()}
    callbacks = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = OTRTModule(task, teacher, layers, cost=cost, **OPTIONS) if wrap else task
        if not wrap:
            callbacks = [OTRTCallback(teacher, layers, cost=cost, **OPTIONS)]
        make_trainer(callbacks=callbacks, **options).fit(trained, DataLoader(Batches(sizes, alone), batch_size=None))
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in task.parameters()]
    return [weight.detach().clone() for weight in weights]


def strategies() -> dict[str, Any]:
    return {
        "ddp": "ddp",
        "unused": "ddp_find_unused_parameters_true",
        "static": DDPStrategy(static_graph=True),
        "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }


def fit_under(names: Sequence[str], sizes: Sequence[int], cost: str, nodes: int = 1, **options: Any) -> Any:
    found = {}
    for name in names:
        found[name] = fit(
            sizes, cost, strategy=strategies()[name], devices=len(sizes) // nodes, num_nodes=nodes, **options
        )
    return found


def check(found: Sequence[dict[str, Any]], sizes: Sequence[int], cost: str) -> None:
    expected = fit(sizes, cost, alone=True)
    plain = [p.detach() for p in Task(sizes).parameters()]
    assert not torch.equal(expected[0], plain[0])
    for results in found:
        for weights in results.values():
            assert_close(weights, expected)


@pytest.mark.parametrize("cost", ["correlation", "euclidean"])
def test_strategies(cost: str) -> None:
    sizes = (5, 1)
    check(run_processes(2, fit_under, ["ddp", "unused", "static", "fsdp2"], sizes, cost, init=False), sizes, cost)
