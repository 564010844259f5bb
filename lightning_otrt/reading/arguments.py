"""The arguments of a forward by their names, however they were passed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["argument_position", "bound_arguments"]


def bound_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], method: str = "forward"
) -> dict[str, Any]:
    """The arguments of ``module(*args, **kwargs)`` by the names in the signature of its ``forward``.

    ``net(ids, mask)`` and ``net(ids, attention_mask=mask)`` give the same. Where an argument is a mapping, as
    some networks take a whole batch, its items count as arguments too. Positional arguments without a name
    (``*args``, or a forward whose signature cannot be read) get their position as name.

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
        if isinstance(whole, Mapping):
            found.update({str(name): value for name, value in whole.items()})
    try:
        signature = inspect.signature(getattr(module, method))
        bound = signature.bind_partial(*args, **kwargs)
    except (TypeError, ValueError, AttributeError):  # the last one for methods of script modules
        # No readable signature, or arguments that do not fit it: the call itself then says what is wrong.
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


def argument_position(module: nn.Module, name: str, method: str = "forward") -> int | None:
    """The place of an argument among the positional ones of a module's method, None where it has none.

    Example:
        >>> from torch import nn
        >>> argument_position(nn.MultiheadAttention(4, 2), "key_padding_mask")
        3
    """
    try:
        parameters = list(inspect.signature(getattr(module, method)).parameters.values())
    except (TypeError, ValueError, AttributeError):
        return None
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [parameter.name for parameter in parameters if parameter.kind in positional]
    return names.index(name) if name in names else None
