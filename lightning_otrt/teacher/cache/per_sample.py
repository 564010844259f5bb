"""Checks on one batch that what a teacher gives for a sample depends on that sample alone."""

from __future__ import annotations

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


def why_not_per_sample(
    inputs: Inputs, size: int, run: Run, whole: Mapping[str, Tensor], limit: float, device: torch.device
) -> str:
    """Run two parts of a batch, and say why what comes out is not that of the whole; ``""`` if it is.

    Every third sample is one part: the halves of a batch may be two views of the same samples, with equal statistics.

    Args:
        inputs: The teacher's inputs. Each run gets tensors of its own.
        size: Samples of the batch. With one there are no parts, and the run is repeated.
        run: Runs the teacher.
        whole: What it gave for the whole batch.
        limit: Largest relative difference that counts as rounding.
        device: Device of the inputs.
    """
    if size == 1:
        return _is_random(run(cloned(inputs), size), whole, limit)
    order = torch.arange(size, device=device)
    parts = [order[order % 3 == 0], order[order % 3 > 0]]
    try:
        first, second = (run(cloned(select_samples(inputs, part, size)), len(part)) for part in parts)
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
    places = torch.cat(parts).argsort()
    difference = _largest_difference({name: torch.cat(made)[places] for name, made in both.items()}, whole)
    if difference <= limit:
        return ""
    return _is_random(run(cloned(inputs), size), whole, limit) or (
        f"it mixes the samples of a batch: for two parts its layers give other values than for the whole, by "
        f"{difference:.2g} of their size, as with batch statistics or attention between samples"
    )


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
        f"it is random in evaluation mode: two forwards of one batch differ by {difference:.2g} of the size of its "
        "outputs, as with dropout that ignores the mode"
    )


def _largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of a neuron, relative to its norm; values that are not finite count where they differ.

    One for all of a layer would show nothing but the few neurons that are much larger than the others, as many networks
    have them. What is smaller than nine of ten is rounded as these are.

    Args:
        found: Tensors ``(samples, rows, C, ...)`` or ``(samples, C)`` by name.
        expected: The same.
    """
    largest = 0.0
    for name, wanted in expected.items():
        a, b = (_of_neurons(widened(value).nan_to_num()) for value in (found[name], wanted))
        sizes, differences = (torch.linalg.vector_norm(value, dim=1) for value in (b, a - b))
        sizes = sizes.clamp_min(float(sizes.quantile(0.9)))
        relative = torch.where(sizes > 0, differences / sizes, (differences > 0).to(sizes.dtype))
        largest = max(largest, float(relative.max()))
    return largest


def _of_neurons(values: Tensor) -> Tensor:
    """All values of each neuron ``(C, n)``."""
    values = values.unsqueeze(-1) if values.dim() == 1 else values
    return values.movedim(min(2, values.dim() - 1), 0).flatten(1)
