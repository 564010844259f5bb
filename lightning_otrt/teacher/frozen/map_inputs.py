"""Applies a function to all tensors among the arguments of a forward."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

__all__ = ["map_inputs"]


def map_inputs(
    inputs: tuple[Sequence[Any], Mapping[str, Any]], function: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, in containers of their own, with what a function gives for each tensor.

    Args:
        inputs: Positional and keyword arguments: tensors in nested containers and dataclasses.
        function: What is applied.

    Example:
        >>> import torch
        >>> map_inputs(((torch.tensor(1), "a"), {"ids": [torch.tensor(2)]}), torch.neg)
        ((tensor(-1), 'a'), {'ids': [tensor(-2)]})
    """
    args, kwargs = inputs
    return (
        tuple(_mapped(value, function) for value in args),
        {name: _mapped(value, function) for name, value in kwargs.items()},
    )


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    parameters = getattr(type(value), "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        return apply_to_collection(value, Tensor, function)
    own = copy.copy(value)  # `apply_to_collection` refuses frozen dataclasses
    for field in dataclasses.fields(value):
        object.__setattr__(own, field.name, _mapped(getattr(value, field.name), function))
    return own
