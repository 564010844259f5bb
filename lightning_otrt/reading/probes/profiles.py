"""Numbers that tell which indices of the tensors of a forward change where its inputs do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.names import is_inside, named_layers, primary_names
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.containers import all_tensors
from lightning_otrt.reading.extra_forwards.evaluation import in_evaluation
from lightning_otrt.reading.neurons.outputs import output_items, sequence_output
from lightning_otrt.reading.torch_internals import add_forward_hook, is_in_backward, is_in_functional_transform
from lightning_otrt.reading.traced.arguments import Inputs, entered_tensor

__all__ = ["is_close", "layer_tensors", "mapped", "profile", "profiles", "sums", "uneven"]

#: Sums of activations may differ so much, relative to the largest, where samples are in other places of a batch.
_TOLERANCE = 1e-3


def profiles(model: nn.Module, traced: Trace, inputs: Inputs, method: str) -> dict[str, tuple[Tensor, Tensor]]:
    """For each tensor that enters or leaves a layer, a number for each index of its first and of its second axis."""
    modules = named_layers(model)
    names = primary_names(modules, traced.root)
    target, found = modules[traced.root], {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for key, tensor in layer_tensors(name, module, args, kwargs, output):
            if tensor.dim() > 1 and not tensor.is_nested and tensor.is_floating_point():
                found[key] = profile(tensor, 0), profile(tensor, 1)

    with in_evaluation(target, all_tensors(inputs)), ExitStack() as hooks:
        for name, module in modules.items():
            if names[id(module)] == name and is_inside(name, traced.root):
                hooks.callback(add_forward_hook(module, functools.partial(note, name), with_kwargs=True).remove)
        args, kwargs = inputs
        (getattr(target, method) if method else target)(*args, **kwargs)
    return found


def layer_tensors(
    name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Iterator[tuple[str, Tensor]]:
    """In a forward hook: the tensor that a layer gives, by its name, and the one that entered it, by ``name:input``.

    There is none where a layer gives several tensors, runs again in a backward pass, or runs inside a transform.
    """
    if is_in_backward() or is_in_functional_transform():
        return
    returned = [item for _, item in output_items(sequence_output(module, output)) if isinstance(item, Tensor)]
    if len(returned) == 1:
        yield name, returned[0]
    entered = entered_tensor(args, kwargs)
    if entered is not None:
        yield name + INPUT, entered


def profile(tensor: Tensor, axis: int) -> Tensor:
    """A number for each index of an axis, which changes where anything at that index does."""
    # Infinite scores would make the sums infinite or NaN, and NaN differs from itself.
    rows = tensor.detach().movedim(axis, 0).flatten(1).float().nan_to_num(0.0, 0.0, 0.0)
    # Not a mean, which is the same for all tokens behind a normalisation.
    return sums(rows, 1)[:, 0]


def sums(rows: Tensor, count: int) -> Tensor:
    """So many weighted sums over the last axis of a float32 tensor."""
    weights = uneven(count * rows.shape[-1], rows.device).view(-1, count)
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ weights


def uneven(count: int, device: torch.device) -> Tensor:
    """As many numbers from -1 to 1 that have no order, always the same."""
    return torch.arange(count, device=device, dtype=torch.float32).mul_(1.7).add_(0.3).sin_()


def mapped(
    inputs: Any, change: Callable[[Tensor], Tensor], change_list: Callable[[list[int]], list[int]] = list
) -> Any:
    """The inputs with other tensors, in containers of their own.

    Args:
        inputs: Nested tuples, lists and mappings.
        change: From a tensor to the one in its place.
        change_list: The same for lists of numbers.

    Raises:
        TypeError: If there is an object of another type.
    """
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, list) and inputs and all(isinstance(item, int) for item in inputs):
        return change_list(inputs)
    if type(inputs) in (list, tuple):
        return type(inputs)(mapped(item, change, change_list) for item in inputs)
    if isinstance(inputs, Mapping):
        return {key: mapped(item, change, change_list) for key, item in inputs.items()}
    if inputs is None or isinstance(inputs, (bool, int, float, str)):
        return inputs
    raise TypeError(f"It is not known which part of a {type(inputs).__name__} belongs to which sample.")


def is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two rows of such numbers are the same but for rounding."""
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= _TOLERANCE * one.abs().max())
