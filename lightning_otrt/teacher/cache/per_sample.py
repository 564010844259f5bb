"""Checks on one batch that what a teacher gives for a sample depends on that sample alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_otrt.reading.containers import map_inputs
from lightning_otrt.reading.neurons.pooling import widened
from lightning_otrt.reading.traced.arguments import Inputs
from lightning_otrt.teacher.cache.samples import select_samples

__all__ = ["Run", "cloned", "tolerance", "why_not_per_sample"]

#: Runs the teacher on inputs of so many samples, and gives what is used of its outputs by name, ``(samples, ...)``.
Run: TypeAlias = Callable[[Inputs, int], dict[str, Tensor]]

#: Largest relative difference that counts as rounding, where the teacher computes in float32.
ROUNDING = 1e-4
#: The same in units of the last place of a shorter type.
_LAST_PLACES = 4
#: Share of that by which two runs of one batch may differ: the same kernels, but for a GPU that sums in any order.
REPEATED = 0.1
#: No neuron counts as smaller than this share of the others: where little is left of large terms, rounding is large.
_USUAL = 0.9
#: The same relative to the root mean square of all, where nearly all are 0.
_LEAST = 1e-2


def why_not_per_sample(
    inputs: Inputs,
    size: int,
    run: Run,
    whole: Mapping[str, Tensor],
    limit: float,
    device: torch.device,
    *,
    by_entry: bool = False,
) -> str:
    """Run a batch again, and two parts of it, and say why what comes out is not that of the whole; ``""`` if it is.

    Args:
        inputs: The teacher's inputs. Each run gets tensors of its own.
        size: Samples of the batch. One sample has no parts.
        run: Runs the teacher.
        whole: What it gave for the whole batch.
        limit: Largest relative difference between parts and whole that counts as rounding.
        device: Device of the inputs.
        by_entry: Whether the parts get their entries of lists without tensors, or the whole of these lists.
    """
    if reason := _is_random(run(cloned(inputs), size), whole, REPEATED * limit):
        return reason
    if size == 1:
        return ""
    chosen = _part(size)
    places = [torch.nonzero(mask)[:, 0] for mask in (chosen, ~chosen)]
    parts = [part.to(device) for part in places]
    given = (
        select_samples(inputs, part, size, place.tolist() if by_entry else None)
        for part, place in zip(parts, places, strict=True)
    )
    try:
        first, second = (run(cloned(one), len(part)) for one, part in zip(given, parts, strict=True))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return (
            f"it fails on a part of a batch, although it runs on the whole ({type(error).__name__}: {error}), as where "
            "its inputs do not have one entry for each sample"
        )
    if first.keys() != whole.keys() or second.keys() != whole.keys():
        return "other layers run for a part of a batch than for the whole"
    both = {name: (first[name], second[name]) for name in whole}
    shapes = [
        f"{tuple(a.shape)} and {tuple(b.shape)} in place of {tuple(whole[name].shape)}"
        for name, (a, b) in both.items()
        if (len(a) + len(b), *a.shape[1:]) != whole[name].shape or a.shape[1:] != b.shape[1:]
    ]
    if shapes:
        return f"parts of a batch give other shapes than the whole ({shapes[0]})"
    back = torch.cat(parts).argsort()
    difference = _largest_difference({name: torch.cat(pair)[back] for name, pair in both.items()}, whole)
    if difference <= limit:
        return ""
    return (
        f"it mixes the samples of a batch: for two parts of it a neuron has other values than for the whole, by "
        f"{difference:.2g} of its size, as with batch statistics or attention between samples"
    )


def _part(size: int) -> Tensor:
    """Which samples of a batch make the first part, ``(size,)``: every third or so.

    Their number and the batch size have no common divisor. Where samples come several times, as in
    ``torch.cat([x, x])``, the part then never holds each of them equally often, which would hide a mean.
    """
    count = min((n for n in range(1, size) if math.gcd(n, size) == 1), key=lambda n: abs(3 * n - size))
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[torch.arange(count) * size // count] = True
    return chosen


def cloned(inputs: Inputs) -> Inputs:
    """The same with tensors of its own, which a network may write to."""
    return map_inputs(inputs, Tensor.clone)


def tolerance(dtype: torch.dtype, *, is_float32_shortened: bool) -> float:
    """Largest relative difference that counts as rounding: kernels depend on the size of a batch.

    Args:
        dtype: Type that the teacher computes in.
        is_float32_shortened: Whether products in float32 are made in TF32.
    """
    # TF32 has the fraction of float16.
    shortened = is_float32_shortened and dtype == torch.float32
    return max(ROUNDING, _LAST_PLACES * torch.finfo(torch.float16 if shortened else dtype).eps)


def _is_random(again: Mapping[str, Tensor], whole: Mapping[str, Tensor], limit: float) -> str:
    same = again.keys() == whole.keys() and all(again[name].shape == whole[name].shape for name in whole)
    difference = _largest_difference(again, whole) if same else 1.0
    if difference <= limit:
        return ""
    return (
        f"it is random in evaluation mode: in two forwards of one batch a neuron differs by {difference:.2g} of its "
        "size, as with dropout that ignores the mode"
    )


def _largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of a neuron, relative to its own size, so that a massive one does not hide the others."""
    return max((_difference(found[name], wanted) for name, wanted in expected.items()), default=0.0)


def _difference(found: Tensor, expected: Tensor) -> float:
    a, b = widened(found), widened(expected)
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return 1.0
    a, b = (_by_neuron(value.where(finite, 0)) for value in (a, b))
    if not b.numel():
        return 0.0
    # Numbers whose squares are finite.
    unit = b.abs().max().clamp_min(torch.finfo(b.dtype).tiny)
    sizes = torch.linalg.vector_norm(b / unit, dim=1)
    usual = sizes.sort().values[int(_USUAL * (len(sizes) - 1))]
    floor = usual.maximum(_LEAST * sizes.square().mean().sqrt())
    differences = torch.linalg.vector_norm((a - b) / unit, dim=1)
    return float((differences / sizes.maximum(floor).clamp_min(torch.finfo(b.dtype).tiny)).max())


def _by_neuron(x: Tensor) -> Tensor:
    """A row for each neuron of ``(samples, rows of a sample, neurons, ...)``, or of the last of fewer axes."""
    axis = min(2, x.dim() - 1)
    return x.movedim(axis, 0).flatten(1) if axis > 0 else x[None]
