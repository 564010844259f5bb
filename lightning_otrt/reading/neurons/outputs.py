"""What modules return: the tensors in it, the one that is recorded, and a description for errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_otrt.reading.containers import all_tensors, as_container, values_of

__all__ = [
    "describe",
    "output_items",
    "packed_mask",
    "returned_tensors",
    "select_tensor",
    "sequence_output",
]


def select_tensor(output: Any, select: str | int | None, where: str) -> Tensor:
    """The floating-point tensor that an output is or holds.

    Args:
        output: What a module returned.
        select: Key or index of the tensor. None: the output is a tensor, or a tuple with exactly one, whatever else is
            in it that is no tensor.
        where: How errors name the layer.

    Raises:
        ValueError: If the output has nothing at ``select``.
        TypeError: If it is not one floating-point tensor.
    """
    if not isinstance(output, Tensor):
        output = _tensor_of(output, select, where)
    if not output.is_floating_point():
        raise TypeError(
            f"{where}: expected a floating-point output, but got {describe(output)}. Indices, masks and complex values "
            "are no activations; choose another layer."
        )
    return output


def _tensor_of(output: Any, select: str | int | None, where: str) -> Tensor:
    """The one tensor in an output that holds it."""
    if select is not None:
        try:
            output = as_container(output)[select]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{where}: its output has no {select!r}; it is {describe(output)}.") from error
    container = as_container(output)
    if isinstance(container, (Mapping, tuple, list)):
        # Sizes and caches beside the tensor are no second choice.
        tensors = [item for item in values_of(container) if isinstance(item, Tensor)]
        if isinstance(container, Mapping) or len(tensors) != 1:
            raise TypeError(f"{where}: its output is not one tensor but {describe(output)}. Choose one with `select=`.")
        output = tensors[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"{where}: expected its output to be a tensor, but got {type(output).__name__}.")
    return output


def sequence_output(module: nn.Module, output: Any) -> Any:
    """The sequence that a recurrent module returns, without its last states; any other output as it is.

    A packed sequence is padded, in the layout of the module (``batch_first``); :func:`packed_mask` tells its padding.

    Example:
        >>> rnn = nn.LSTM(4, 5, batch_first=True)
        >>> sequence_output(rnn, rnn(torch.zeros(2, 3, 4))).shape
        torch.Size([2, 3, 5])
    """
    if not isinstance(module, nn.RNNBase) or not isinstance(output, tuple) or isinstance(output, PackedSequence):
        return output
    sequence = output[0]
    if isinstance(sequence, PackedSequence):
        sequence, _ = pad_packed_sequence(sequence, batch_first=module.batch_first)
    return sequence


def packed_mask(output: Any) -> Tensor | None:
    """The mask ``(B, T)`` of a packed sequence, alone or first in a tuple, true where it holds a step; else None."""
    if isinstance(output, tuple) and not isinstance(output, PackedSequence) and output:
        output = output[0]
    if not isinstance(output, PackedSequence):
        return None
    _, lengths = pad_packed_sequence(output)
    steps = torch.arange(int(lengths.max()), device=output.data.device)
    return steps < lengths.to(output.data.device)[:, None]


def output_items(output: Any) -> list[tuple[str | int, Any]]:
    """Keys or indices of an output with what they hold; a value that is no container has the index 0."""
    output = as_container(output)
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, (tuple, list)):
        return list(enumerate(output))
    return [(0, output)]


def returned_tensors(output: Any) -> list[Tensor]:
    """All tensors in what a network returns; in the attributes of objects of other types, where it has no others."""
    found = list(all_tensors(output))
    if found:
        return found
    objects = output if isinstance(output, (tuple, list)) else (output,)
    return list(all_tensors([dict(vars(item)) for item in objects if hasattr(item, "__dict__")]))


def describe(value: Any) -> str:
    """A value in words: dtype and shape of tensors, also of those in a mapping or tuple, and types of the others.

    Example:
        >>> import torch
        >>> describe(torch.zeros(2, 3))
        'float32 (2, 3)'
        >>> describe({"hidden": torch.zeros(2, 3), "pooled": None})
        'dict(hidden: float32 (2, 3), pooled: None)'
    """
    kind, value = type(value).__name__, as_container(value)
    if isinstance(value, Mapping):
        items = [f"{key}: {_describe_item(item)}" for key, item in value.items()]
    elif isinstance(value, (tuple, list)):
        items = [_describe_item(item) for item in value]
    else:
        return _describe_item(value)
    return f"{kind}({', '.join(items)})"


def _describe_item(value: Any) -> str:
    if isinstance(value, Tensor) and value.is_nested:
        return "nested tensor"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "None" if value is None else type(value).__name__
