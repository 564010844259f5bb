"""The pairs of "matched": blocks of the student with the closest layers of the teacher on one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_otrt.layers.comparable import comparable_layers
from lightning_otrt.layers.grammar import written
from lightning_otrt.layers.order import match_in_order
from lightning_otrt.layers.resolve import select_layers
from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.chance import MIN_SAMPLES, OtherSamples, relative_to_chance
from lightning_otrt.reading.extra_forwards.evaluation import in_evaluation
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.hooks.observer import Observer
from lightning_otrt.reading.neurons.pooling import pool
from lightning_otrt.reading.neurons.positions import can_be_compared, match_positions
from lightning_otrt.reading.probes.token_order import settle_token_order
from lightning_otrt.reading.traced.network_call import NetworkCall
from lightning_otrt.transport.distance import transport_distance

__all__ = ["match_layers"]

#: Positions along each axis of a map at which layers are compared.
_GRID = 4


def match_layers(
    traces: tuple[Trace, Trace],
    calls: tuple[NetworkCall, NetworkCall],
) -> list[tuple[str, str]]:
    """The blocks of the student with those layers of the teacher that are closest to them on one batch, in order.

    Distances are those of the correlation cost, in evaluation mode, over the distance to the teacher's layer with other
    samples (:func:`~lightning_otrt.reading.chance.relative_to_chance`); the pairing is that of :func:`match_in_order`.

    Args:
        traces: Traces of student and teacher.
        calls: What to run of each.

    Raises:
        ValueError: If no student layer can be compared with a teacher layer, or the batch has a single sample.
    """
    student, teacher = traces
    candidates = [written(name) for name in comparable_layers(teacher) if teacher.position_count(name) > 1]
    layers = select_layers(["blocks"], student, "student"), select_layers(candidates, teacher, "teacher")
    settled = [
        settle_token_order(call.model, trace, chosen, call.inputs, call.method)
        for call, trace, chosen in zip(calls, traces, layers, strict=True)
    ]
    readings = [
        _readings(side, call, trace, chosen)
        for side, call, trace, chosen in zip(("student", "teacher"), calls, settled, layers, strict=True)
    ]
    ys, xs = _at_same_positions(*readings)
    if min(map(len, [*ys, *xs]), default=MIN_SAMPLES) < MIN_SAMPLES:
        raise ValueError(
            '"matched" compares layers on the first batch, which has a single sample: their distance by chance, which '
            "other samples give, is not known. Use larger batches, or find the pairs over several of them: "
            "layers=compare_representations(student, teacher, dataloader).as_layers()."
        )
    others = OtherSamples()
    shuffled = [others(name, x) for name, x in zip(layers[1], xs, strict=True)]
    distances, chance = (_distances(ys, side) for side in (xs, shuffled))
    pairs = match_in_order(relative_to_chance(distances, chance))
    names = [list(chosen) for chosen in layers]
    if not pairs:
        raise ValueError(
            f'"matched" found no pair: none of the student layers {names[0]} can be compared with one of the teacher '
            f"layers {names[1]}. Name the pairs."
        )
    return [(names[0][row], names[1][column]) for row, column in pairs]


def _readings(side: str, call: NetworkCall, trace: Trace, layers: Mapping[str, int]) -> list[Tensor]:
    """Readings of the layers in the order of ``layers``."""
    module, (args, kwargs) = call.module, InputGuard(clones=True).copied(call.inputs)
    observer = Observer(side, call.model, trace, layers, _GRID)
    try:
        with in_evaluation(module):
            if call.method:
                found = observer(getattr(module, call.method), tuple(args), kwargs, module)
            else:
                found = observer(module, tuple(args), kwargs)
    finally:
        observer.remove()
    return [found[name] for name in layers]


def _distances(student: Sequence[Tensor], teacher: Sequence[Tensor | None]) -> Tensor:
    """Distances between readings, NaN where two cannot be compared."""
    distances = torch.full((len(student), len(teacher)), math.nan)
    for row, y in enumerate(student):
        for column, x in enumerate(teacher):
            if x is not None and can_be_compared(y, x):
                distances[row, column] = transport_distance(*match_positions(y, x, "matched")).value
    return distances


def _at_same_positions(student: list[Tensor], teacher: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The readings pooled to the smallest size along each axis: distances over fewer observations are smaller."""
    sizes: dict[int, tuple[int, ...]] = {}
    for reading in (*student, *teacher):
        own = tuple(reading.shape[2:])
        sizes[reading.dim()] = tuple(map(min, sizes.get(reading.dim(), own), own))
    pooled = [[pool(reading, sizes[reading.dim()]) for reading in side] for side in (student, teacher)]
    return pooled[0], pooled[1]
