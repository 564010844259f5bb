"""Walks over what forwards take and return: tensors in nested containers.

What they look into, besides tuples, lists and mappings:

===============================  ===========  ================================  =====================================
function                         dataclasses  attributes of other objects       anything else
===============================  ===========  ================================  =====================================
:func:`all_tensors`              yes          no, but those of a namespace      left out
:func:`tensors_in`               no slots     yes, but no slots                 left out; each tensor comes once
:func:`map_inputs`               yes          no                                passed on as it is
``InputGuard.copied``            yes          yes                               passed on if it cannot be copied
``profiles.mapped``              raises       raises                            numbers and text are passed on
``samples.leaves``               yes          raises                            numbers and text come with their path
===============================  ===========  ================================  =====================================

The first two differ in objects: one that a network returns may keep what is of an earlier forward, but one that enters
may be a whole batch. The last two raise, since they have to know which part of a value belongs to which sample.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

__all__ = ["CONSTANT", "all_tensors", "as_container", "map_inputs", "tensors_in", "tensors_of_samples", "values_of"]

#: Values that no forward can change.
CONSTANT = (
    *(nn.Module, str, bytes, int, float, complex, bool, type(None), torch.device, torch.dtype, torch.Generator, type),
    *(FunctionType, BuiltinFunctionType, MethodType, ModuleType),
)


def as_container(output: Any) -> Any:
    """The attributes of a dataclass or a namespace by name; any other output as it is.

    Example:
        >>> as_container(SimpleNamespace(logits=2)), as_container("text")
        ({'logits': 2}, 'text')
    """
    if isinstance(output, SimpleNamespace):
        return dict(vars(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, (type, Mapping, Tensor, nn.Module)):
        return {item.name: getattr(output, item.name, None) for item in dataclasses.fields(output)}
    return output


def values_of(container: Any) -> Iterator[Any]:
    """The items of a mapping, a tuple or a list."""
    return iter(container.values() if isinstance(container, Mapping) else container)


def all_tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, tuples, lists, dataclasses and namespaces, in order."""
    value = as_container(value)
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in values_of(value):
            yield from all_tensors(item)


def tensors_of_samples(value: Any) -> list[Tensor]:
    """The tensors of :func:`all_tensors` by which samples are counted: of a packed sequence one with an entry for each.

    Its data has all steps of all samples along one axis.
    """
    value = as_container(value)
    if isinstance(value, PackedSequence):
        return [value.data.new_empty(int(value.batch_sizes[0]))]
    if isinstance(value, (Mapping, tuple, list)):
        return [tensor for item in values_of(value) for tensor in tensors_of_samples(item)]
    return [value] if isinstance(value, Tensor) else []


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested containers and in the attributes of data objects, each once."""
    return _tensors(value, set())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, seen)
    elif not isinstance(value, CONSTANT) and hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from _tensors(item, seen)


def map_inputs(
    inputs: tuple[Sequence[Any], Mapping[str, Any]],
    function: Callable[[Tensor], Tensor],
    of_list: Callable[[Sequence[Any]], Any] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, in containers of their own, with what a function gives for each tensor.

    Args:
        inputs: Positional and keyword arguments: tensors in nested containers and dataclasses.
        function: What is applied.
        of_list: What is applied to each list or tuple without tensors, such as one of texts.

    Example:
        >>> import torch
        >>> map_inputs(((torch.tensor(1), "a"), {"ids": [torch.tensor(2)]}), torch.neg)
        ((tensor(-1), 'a'), {'ids': [tensor(-2)]})
        >>> map_inputs(((torch.tensor(1), ["a", "b"]), {}), torch.neg, of_list=len)
        ((tensor(-1), 2), {})
    """
    args, kwargs = inputs
    return (
        tuple(_mapped(value, function, of_list) for value in args),
        {name: _mapped(value, function, of_list) for name, value in kwargs.items()},
    )


def _mapped(
    value: Any, function: Callable[[Tensor], Tensor], of_list: Callable[[Sequence[Any]], Any] | None = None
) -> Any:
    kind = type(value)
    if of_list is not None and kind in (tuple, list) and next(all_tensors(value), None) is None:
        return of_list(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(_mapped(item, function, of_list) for item in value))
    if kind in (tuple, list):
        return kind(_mapped(item, function, of_list) for item in value)
    if kind is dict:
        return {key: _mapped(item, function, of_list) for key, item in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, (type, Mapping, Sequence, Tensor, nn.Module)):
        return apply_to_collection(value, Tensor, function)
    own = copy.copy(value)  # `apply_to_collection` refuses frozen dataclasses, and those that hold one
    for field in dataclasses.fields(value):
        if hasattr(value, field.name):
            object.__setattr__(own, field.name, _mapped(getattr(value, field.name), function, of_list))
    return own
