"""Model compression: a student with half the channels learns the teacher's task from ten labelled images per class."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from examples import report
from examples.digits import digits
from examples.glyphs import glyphs
from examples.networks import STUDENT_WIDTHS, ConvNet
from lightning_otrt import OTRTCallback
from torch import nn
from torch.utils.data import TensorDataset

LAYERS = {f"net.blocks.{block}": f"blocks.{block}" for block in range(3)}


def compare(
    teacher: Callable[[int], nn.Module],
    few: Callable[[int], TensorDataset],
    test: Callable[[int], TensorDataset],
    *,
    steps: int,
    seeds: int,
) -> report.Accuracies:
    """Trains students with and without transport on the same images, from the same initial weights."""
    accuracies: report.Accuracies = {"plain": [], "OT": []}
    for seed in range(seeds):
        data, source = few(seed), teacher(seed)
        for method, values in accuracies.items():
            callbacks = [OTRTCallback(source, LAYERS, student_root="net")] if method == "OT" else []
            build = partial(ConvNet, STUDENT_WIDTHS, report.num_classes(data))
            label = f"student {seed}, {method}"
            student = report.train(build, data, steps=steps, seed=seed, label=label, callbacks=callbacks)
            values.append(report.accuracy(student, test(seed)))
    return accuracies
