"""Which axis holds the samples, and whether a network puts them in another order: both show on a permuted batch."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.names import is_inside, named_layers, primary_names
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor
from lightning_otrt.reading.evaluation import in_evaluation
from lightning_otrt.reading.input_guard import InputGuard
from lightning_otrt.reading.outputs import all_tensors, output_items, sequence_output
from lightning_otrt.reading.torch_internals import add_forward_hook, is_in_backward

__all__ = ["settle_order"]

#: Sums of activations may differ so much, relative to the largest, where samples are in other places of a batch.
_TOLERANCE = 1e-3


def settle_order(
    model: nn.Module, traced: Trace, inputs: tuple[Sequence[Any], Mapping[str, Any]], method: str
) -> Trace:
    """The trace with axes of the samples that do not depend on sizes, and with the layers that reorder samples.

    Where a sequence has as many positions as the batch has samples, sizes do not tell ``(B, T, C)`` from ``(T, B, C)``.
    In this case, and where the network may sort its samples by their lengths, it runs twice more: on these inputs, and
    on the same with the last sample first. Others cost nothing.

    Args:
        model: The whole model.
        traced: The trace of one forward.
        inputs: Arguments of the root, not used by another forward before.
        method: Method of the root that is called in place of its forward.
    """
    unclear = {layer.name for layer in traced.layers if any(_is_square(t, traced) for t in (layer.input, layer.output))}
    tensors = list(all_tensors(inputs))
    has_lengths = any(tensor.dim() == 1 and not tensor.is_floating_point() for tensor in tensors)
    if traced.batch_size < 2 or not (
        unclear or has_lengths or any(layer.role == "recurrent" for layer in traced.layers)
    ):
        return traced
    try:
        first, second = (
            _profiles(model, traced, given, method)
            for given in (InputGuard().copied(inputs), _rolled(inputs, traced.batch_size))
        )
    except Exception:  # these samples cannot stand in another order: the sizes have to tell
        return replace(traced, unclear_axes=tuple(sorted(unclear)))
    # Where the first input holds no samples, such as a hidden state of so many layers, nothing may have moved at all.
    first_input = next((tensor for tensor in tensors if tensor.dim() > 0), None)
    is_moved = first_input is not None and not first_input.is_nested and len(first_input) == traced.batch_size
    layers, reordered, still = [], [], []
    for layer in traced.layers:
        sides: dict[str, TracedTensor | None] = {"": layer.output, INPUT: layer.input}
        for suffix, tensor in sides.items():
            name = layer.name + suffix
            if tensor is None or name not in first or name not in second:
                continue
            axes = [axis for axis in (0, 1) if _follows(first[name], second[name], axis)]
            if _is_square(tensor, traced) and axes != [0, 1]:
                still += [] if axes else [name]
                sides[suffix] = tensor = replace(tensor, batch_axis=axes[0] if axes else tensor.batch_axis)
            if is_moved and _is_reordered(first[name], second[name], tensor.batch_axis):
                reordered.append(name)
        layers.append(replace(layer, output=sides[""], input=sides[INPUT], parts=_parts(layer, sides[""])))
    return replace(traced, layers=tuple(layers), reordered=tuple(reordered), unclear_axes=tuple(still))


def _parts(layer: TracedLayer, output: TracedTensor | None) -> tuple[tuple[str | int, TracedTensor], ...]:
    if output is None or len(layer.parts) != 1:
        return layer.parts
    return ((layer.parts[0][0], output),)


def _is_square(tensor: TracedTensor | None, traced: Trace) -> bool:
    """Whether the sizes of a sequence do not tell which axis holds the samples."""
    return tensor is not None and len(tensor.shape) == 3 and tensor.shape[0] == tensor.shape[1] == traced.batch_size


def _rolled(value: Any, samples: int) -> Any:
    """The inputs with the last sample first."""
    if isinstance(value, Tensor):
        is_batch = value.dim() > 0 and not value.is_nested and value.shape[0] == samples
        return value.roll(1, 0) if is_batch else value
    if isinstance(value, list) and len(value) == samples and all(isinstance(item, int) for item in value):
        return [value[-1], *value[:-1]]
    if type(value) in (list, tuple):
        return type(value)(_rolled(item, samples) for item in value)
    if isinstance(value, Mapping):
        return {key: _rolled(item, samples) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"It is not known which part of a {type(value).__name__} belongs to which sample.")


def _profiles(
    model: nn.Module, traced: Trace, inputs: tuple[Sequence[Any], Mapping[str, Any]], method: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each tensor that enters or leaves a layer, a number for each index of its first and of its second axis."""
    modules = named_layers(model)
    names = primary_names(modules, traced.root)
    target, found = modules[traced.root], {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if is_in_backward():
            return
        returned = [item for _, item in output_items(sequence_output(module, output)) if isinstance(item, Tensor)]
        entered = next((arg for arg in args if isinstance(arg, Tensor)), None)
        for key, tensor in ((name, returned[0] if len(returned) == 1 else None), (name + INPUT, entered)):
            if tensor is not None and tensor.dim() > 1 and not tensor.is_nested and tensor.is_floating_point():
                found[key] = _profile(tensor, 0), _profile(tensor, 1)

    with in_evaluation(target, all_tensors(inputs)), ExitStack() as hooks:
        for name, module in modules.items():
            if names[id(module)] == name and is_inside(name, traced.root):
                hooks.callback(add_forward_hook(module, functools.partial(note, name)).remove)
        args, kwargs = inputs
        (getattr(target, method) if method else target)(*args, **kwargs)
    return found


def _profile(tensor: Tensor, axis: int) -> Tensor:
    rows = tensor.detach().movedim(axis, 0).flatten(1).float()
    # Not a mean, which is the same for all tokens behind a normalisation.
    return rows @ torch.arange(rows.shape[1], device=rows.device, dtype=rows.dtype).mul_(1.7).add_(0.3).sin_()


def _follows(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], axis: int) -> bool:
    """Whether the samples lie along an axis: there the last one came first."""
    return _is_close(first[axis].roll(1), second[axis])


def _is_reordered(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], axis: int) -> bool:
    """Whether a tensor holds the same samples in another order than the inputs."""
    same = _is_close(first[axis].sort().values, second[axis].sort().values)
    return same and not _follows(first, second, axis)


def _is_close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= _TOLERANCE * one.abs().max())
