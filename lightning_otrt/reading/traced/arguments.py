"""The arguments of a forward by their names, however they were passed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from lightning_otrt.reading.extra_forwards.plain_values import slot_names

__all__ = [
    "Inputs",
    "argument_position",
    "bound_arguments",
    "entered_tensor",
    "items_by_name",
    "positional_names",
    "positions_by_name",
    "renamed",
    "signature_of",
]

#: Positional and keyword arguments of a forward.
Inputs: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]


def bound_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], method: str = "forward"
) -> dict[str, Any]:
    """The arguments of ``module(*args, **kwargs)`` by the names in the signature of its ``forward``.

    ``net(ids, mask)`` and ``net(ids, attention_mask=mask)`` give the same. Where an argument is a mapping or an object
    with attributes, as some networks take a whole batch, its items count as arguments too. Positional arguments without
    a name (``*args``, or a forward whose signature cannot be read) get their position as name.

    Args:
        module: The module that is called.
        args: Positional arguments.
        kwargs: Keyword arguments.
        method: The method that is called.

    Example:
        >>> from torch import nn
        >>> bound_arguments(nn.Linear(2, 3), ("x",), {})
        {'input': 'x'}
    """
    found: dict[str, Any] = {}
    for whole in (*args, *kwargs.values()):
        found.update(items_by_name(whole))
    signature = signature_of(module, method)
    try:
        bound = None if signature is None else signature.bind_partial(*args, **kwargs)
    except TypeError:  # arguments that do not fit: the call itself then says what is wrong
        bound = None
    if signature is None or bound is None:
        return {**found, **{str(place): value for place, value in enumerate(args)}, **kwargs}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found.update({str(place): item for place, item in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[name] = value
    return found


def entered_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What enters a layer, ``"name:input"``: its first positional argument that is a tensor, else its first keyword.

    Keywords have the order of the call.

    Example:
        >>> import torch
        >>> x, mask = torch.tensor(1), torch.tensor(2)
        >>> entered_tensor((None, x), {"mask": mask}), entered_tensor((), {"x": x, "mask": mask})
        (tensor(1), tensor(1))
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return tensors[0] if tensors else None  # no `next` with a default, which torch 2.6 does not compile


def items_by_name(whole: Any) -> dict[str, Any]:
    """What an argument holds under names: the items of a mapping, the attributes of an object.

    Example:
        >>> from types import SimpleNamespace
        >>> items_by_name({"ids": 1}), items_by_name(SimpleNamespace(ids=1)), items_by_name([1])
        ({'ids': 1}, {'ids': 1}, {})
    """
    if isinstance(whole, Mapping):
        return {str(name): value for name, value in whole.items()}
    if isinstance(whole, tuple):
        return dict(zip(getattr(whole, "_fields", ()), whole, strict=False))
    if isinstance(whole, (Tensor, nn.Module, type, list)) or callable(whole):
        return {}
    names = slot_names(type(whole))
    return {**{name: getattr(whole, name) for name in names if hasattr(whole, name)}, **getattr(whole, "__dict__", {})}


def signature_of(module: nn.Module, method: str = "forward") -> inspect.Signature | None:
    """The signature of a module's method; None where it cannot be read, as for some methods of script modules."""
    try:
        return inspect.signature(getattr(module, method))
    except (TypeError, ValueError, AttributeError):
        return None


def positional_names(module: nn.Module, method: str = "forward") -> list[str]:
    """The names of the arguments that a module's method takes by position, without those of ``*args``.

    Example:
        >>> from torch import nn
        >>> positional_names(nn.Bilinear(2, 2, 2))
        ['input1', 'input2']
    """
    signature = signature_of(module, method)
    parameters = () if signature is None else signature.parameters.values()
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def argument_position(module: nn.Module, name: str, method: str = "forward") -> int | None:
    """The place of an argument among the positional ones of a module's method, None where it has none.

    Example:
        >>> from torch import nn
        >>> argument_position(nn.MultiheadAttention(4, 2), "key_padding_mask")
        3
    """
    names = positional_names(module, method)
    return names.index(name) if name in names else None


def positions_by_name(
    source: nn.Module, method: str, target: nn.Module, target_method: str = "forward"
) -> tuple[str | None, ...]:
    """By which names a network takes the positional arguments of another, where a shared name has another place.

    Args:
        source: The network that got the arguments.
        method: Its method that was called.
        target: The network that is to get them.
        target_method: Its method that is called.

    Returns:
        For each place of the source's arguments None for the same place, a name, or ``""`` where the target has no such
        argument; empty where no shared name has another place.

    Example:
        >>> positions_by_name(nn.Bilinear(2, 2, 2), "forward", nn.Bilinear(3, 3, 3))
        ()
    """
    own, other = _names_for_both_ways(source, method), _names_for_both_ways(target, target_method)
    places = {name: place for place, name in enumerate(other)}
    moved = [place for place, name in enumerate(own) if places.get(name, place) != place]
    if not moved:
        return ()
    first = moved[0]
    later = [name if name in places else "" for name in own[first:]]
    return (*(None for _ in range(first)), *later)


def renamed(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], names: tuple[str | None, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by the names that :func:`positions_by_name` gives.

    Raises:
        ValueError: If there is one that the other network does not take.
    """
    same = [value for place, value in enumerate(args) if place >= len(names) or names[place] is None]
    found = dict(kwargs)
    for name, value in zip(names, args, strict=False):
        if name == "" and value is not None:
            raise ValueError(
                "The student and the teacher name their positional arguments otherwise, and the teacher has no "
                f"argument for one that the student got. Its arguments would be {[each for each in names if each]}. "
                "Make them with `teacher_inputs`, a function of the student's inputs."
            )
        if name:
            found[name] = value
    return tuple(same), found


def _names_for_both_ways(module: nn.Module, method: str) -> list[str]:
    """The arguments that can be given by position and by name; no names if there are ``*args``."""
    signature = signature_of(module, method)
    parameters = [] if signature is None else list(signature.parameters.values())
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return []
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
