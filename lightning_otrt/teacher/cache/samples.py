"""Which inputs of a network belong to single samples: sizes, names, and a part of a batch."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_otrt.reading.containers import map_inputs
from lightning_otrt.reading.traced.arguments import Inputs

__all__ = ["batch_size_of", "is_per_sample", "leaves", "select_samples", "shown_path"]

#: Types whose `repr` shows the whole value.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, slice, torch.dtype, torch.device)


def leaves(inputs: Any, path: str = "inputs") -> Iterator[tuple[str, Any]]:
    """The tensors and plain values of nested inputs, with a path that tells containers and keys apart.

    Raises:
        TypeError: If a value is neither, so that its content cannot be read.
    """
    name = f"{path}:{type(inputs).__name__}"
    if isinstance(inputs, (Tensor, *_PLAIN)):
        yield name, inputs
    elif isinstance(inputs, Mapping):
        yield name, len(inputs)
        for key, value in inputs.items():
            yield from leaves(value, f"{name}[{key!r}]")
    elif isinstance(inputs, (tuple, list)):
        yield name, len(inputs)
        for index, value in enumerate(inputs):
            yield from leaves(value, f"{name}[{index}]")
    elif is_dataclass(inputs) and not isinstance(inputs, type):
        for field in fields(inputs):
            yield from leaves(getattr(inputs, field.name), f"{name}.{field.name}")
    else:
        raise TypeError(
            f"The teacher's input {shown_path(path)} is of type {type(inputs).__name__}, whose content cannot be read, "
            "so that samples cannot be told apart. Return tensors, numbers and strings from `teacher_inputs`, in "
            "tuples, lists or dictionaries."
        )


def shown_path(path: str) -> str:
    """A path of :func:`leaves` without types.

    Example:
        >>> shown_path("inputs:tuple[1]:dict['x']:Tensor")
        "inputs[1]['x']"
    """
    return re.sub(r":\w+", "", path)


def batch_size_of(inputs: Inputs) -> int:
    """The size of the first axis of the first tensor that has axes.

    Raises:
        ValueError: If there is no such tensor.
    """
    for _, value in leaves(inputs):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    raise ValueError(
        "The teacher's inputs hold no tensor with an axis of samples, so that nothing can be kept per sample. Return "
        "tensors from `teacher_inputs`, or leave out `teacher_cache`."
    )


def is_per_sample(value: Any, batch_size: int) -> bool:
    """Whether the first axis of a value is the batch."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch_size


def select_samples(inputs: Inputs, index: Tensor, batch_size: int, places: Sequence[int] | None = None) -> Inputs:
    """Some samples of a batch; what is not per sample stays as it is.

    Args:
        inputs: Positional and keyword arguments.
        index: Numbers of the samples ``(S,)``.
        batch_size: Samples of the batch.
        places: The same numbers on the host, where lists of texts or numbers have an entry for each sample, too.

    Example:
        >>> import torch
        >>> images, scale = torch.arange(6.0).view(3, 2), torch.tensor(2.0)
        >>> select_samples(((images,), {"scale": scale}), torch.tensor([2, 0]), 3)
        ((tensor([[4., 5.],
                [0., 1.]]),), {'scale': tensor(2.)})
    """

    def select(tensor: Tensor) -> Tensor:
        # Inputs may lie on several devices, such as the lengths of texts on the CPU.
        return tensor.index_select(0, index.to(tensor.device)) if is_per_sample(tensor, batch_size) else tensor

    def select_entries(values: Sequence[Any]) -> Sequence[Any]:
        if len(values) != batch_size:
            return values
        chosen = [values[place] for place in places or ()]
        return tuple(chosen) if isinstance(values, tuple) else chosen

    return map_inputs(inputs, select, None if places is None else select_entries)
