"""The calls of modules that are running in a traced forward: whose sequence each has, and which others it looks at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import OF_TARGET
from lightning_otrt.reading.traced.arguments import signature_of

__all__ = ["ModuleCall", "argument_names", "is_ids", "is_tensor", "takes_any"]

#: What a decoder, or a layer of one, gets besides its own sequence.
_MEMORY = ("encoder_hidden_states", "encoder_out", "memory", "key_value_states", "cross_attention_states")
#: The same, where the first tensor is another one: latent vectors that look at inputs.
_MEMORY_OF_LATENTS = ("inputs", "context")


@dataclass(frozen=True)
class ModuleCall:
    """A module that is running. What follows from its arguments is found once, since each layer inside of it reads it.

    Args:
        name: Its name.
        module: The module.
        arguments: Its arguments by name, in the order of its signature.
        method: The method that was called.
    """

    name: str
    module: nn.Module
    arguments: Mapping[str, Any]
    method: str = "forward"

    @cached_property
    def sequence(self) -> Tensor | None:
        """Its first tensor that is no mask."""
        return next((value for name, value in self.arguments.items() if is_tensor(value) and "mask" not in name), None)

    @cached_property
    def looks_at_memory(self) -> bool:
        """Whether it is a decoder or a part of one, which gets another sequence too."""
        names = [name for name in _MEMORY if self.arguments.get(name) is not None]
        names += [name for name in _MEMORY_OF_LATENTS if is_tensor(self.arguments.get(name))]
        return any(self.arguments[name] is not self.sequence for name in names)

    @cached_property
    def memories(self) -> tuple[Tensor, ...]:
        """The sequences that its own one looks at. Maps of several sizes come as a list."""
        names = [*_MEMORY, *_MEMORY_OF_LATENTS, *(("key", "value") if self.is_cross_attention else ())]
        given: list[Any] = [self.arguments.get(name) for name in names]
        found = [part for value in given for part in (value if isinstance(value, (list, tuple)) else (value,))]
        return tuple(value for value in found if is_tensor(value) and value is not self.sequence)

    @cached_property
    def is_cross_attention(self) -> bool:
        """Whether its mask is that of the keys, and these are no queries."""
        query, key = self.arguments.get("query"), self.arguments.get("key")
        is_named = "cross" in self.name.rpartition(".")[2].lower() or "Cross" in type(self.module).__name__
        has_other_keys = key is not None and query is not None and key is not query
        return is_named or has_other_keys or self.arguments.get("key_value_states") is not None

    @cached_property
    def has_two_sequences(self) -> bool:
        """Whether it gets the sequences of an encoder and of a decoder."""
        return any(name.startswith(OF_TARGET) for name in self.arguments) and not self.looks_at_memory


def argument_names(call: ModuleCall) -> tuple[str, ...]:
    """The arguments that a forward got or could have got."""
    return tuple(dict.fromkeys((*_signature(getattr(type(call.module), call.method, None)), *call.arguments)))


@lru_cache(maxsize=4096)
def _signature(forward: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return ()
    several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return tuple(parameter.name for parameter in parameters[1:] if parameter.kind not in several)


def takes_any(call: ModuleCall) -> bool:
    """Whether a later batch may have arguments that neither the signature nor this call shows."""
    signature = signature_of(call.module, call.method)
    if signature is None:
        return False
    parameters = signature.parameters.values()
    names = {parameter.name for parameter in parameters}
    is_mapping = len(names) == 1 and isinstance(call.arguments.get(next(iter(names))), Mapping)
    return is_mapping or any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor that is not nested."""
    return isinstance(value, Tensor) and not value.is_nested


def is_ids(tensor: Tensor) -> bool:
    """Whether it may hold the ids of tokens, ``(B, T)``."""
    return tensor.dim() == 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool
