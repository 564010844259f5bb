"""Fits with the monitor, and what it logged."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib as mpl
import torch
from helpers import (
    Net,
    loader,
    make_trainer,
)
from torch.utils.data import DataLoader, TensorDataset

from lightning_otrt.reading.neurons.reader import neurons

mpl.use("Agg")


def fit(task, *callbacks, data=None, validation=None, **options):
    trainer = make_trainer(callbacks=list(callbacks), **options)
    trainer.fit(task, loader() if data is None else data, validation)
    return trainer


def repeated(count: int) -> DataLoader:
    """The same batch several times."""
    x, y = next(iter(loader(batch_size=32)))
    return DataLoader(TensorDataset(x.repeat(count, 1, 1, 1), y.repeat(count)), batch_size=32)


def rows(logger) -> list[dict[str, str]]:
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return list(csv.DictReader(file))


def column(logger, name) -> dict[int, float]:
    return {int(row["step"]): float(row[name]) for row in rows(logger) if row.get(name)}


def read(net: Net, name, x):
    found = []
    hook = net.get_submodule(name).register_forward_hook(lambda module, args, output: found.append(output.clone()))
    with hook, torch.no_grad():
        net(x)
    return neurons(found[0], neuron_axis=1)


def shard(rank: int) -> list[torch.Tensor]:
    x = torch.cat([batch[0] for batch in loader(60, 60)])
    return list(x[rank::2].split(7))
