"""A copy of a module in another type that follows its source, since the owner of a teacher may train it."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.reading.torch_internals import unwrapped, version_of
from lightning_otrt.teacher.frozen.plain_watch import STEPS_BETWEEN_LOOKS, PlainWatch

__all__ = ["FollowingCopy", "has_dtype"]


class FollowingCopy:
    """A deep copy of a module in another type; :meth:`refresh` brings it to the values that the source has now.

    A copy, because a cast in place loses digits: from bfloat16 the user's float32 values cannot be restored.

    Args:
        source: The user's module.
        dtype: Type of the copy.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> copied = FollowingCopy(net, torch.bfloat16)
        >>> with torch.no_grad():
        ...     _ = net.weight.fill_(3.0)
        >>> copied.refresh()
        >>> copied.module.weight.tolist()
        [[3.0, 3.0]]
    """

    def __init__(self, source: nn.Module, dtype: torch.dtype) -> None:
        self.source = unwrapped(source)  # hooks on a compiled module would compile it again
        self.dtype = dtype
        self.module = _deep_copy(self.source).to(dtype)
        self._seen = _values(self.source)
        self._plain, self._calls = PlainWatch(self.source), 0

    def refresh(self) -> None:
        """Copy parameters and buffers where the source changed, and all of it where its code, attributes or hooks did.

        Nothing waits for a device.

        Every write to a tensor raises its version, but for writes to its ``data``. On the CPU one value of each tensor
        shows those; on other devices a look would wait, and the weights are copied every time.
        """
        self._calls += 1
        is_other = bool(self._plain.changed(everything=self._calls % STEPS_BETWEEN_LOOKS == 0))
        now = _values(self.source)
        if now == self._seen and now != [None] and not is_other:
            return
        own, theirs = _tensors(self.module), _tensors(self.source)
        if not is_other and [tensor.shape for tensor in own] == [tensor.shape for tensor in theirs]:
            with torch.no_grad():
                for tensor, given in zip(own, theirs, strict=True):
                    tensor.copy_(given)
        else:  # the owner changed more than its weights
            self.module = _deep_copy(self.source).to(self.dtype)
        self._seen = now


def has_dtype(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether all parameters with a fraction are of a type; all buffers, where there are no such parameters.

    A network of half precision may keep some buffers in float32 on purpose, such as frequencies of rotary positions.
    """
    parameters, buffers = (
        [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        for tensors in (module.parameters(), module.buffers())
    )
    return all(own == dtype for own in parameters or buffers)


def _tensors(module: nn.Module) -> list[Tensor]:
    return list(chain(module.parameters(), module.buffers()))


def _values(module: nn.Module) -> list[Any]:
    """What shows that a tensor was written to, None for one on another device than the CPU."""
    found: list[Any] = []
    for tensor in _tensors(module):
        if tensor.device.type != "cpu":
            return [None]
        plain = tensor.numel() and tensor.layout is torch.strided and not tensor.is_quantized
        value = tensor.detach()[tuple(size // 2 for size in tensor.shape)].item() if plain else 0
        found.append((id(tensor), version_of(tensor), value))
    return found


def _deep_copy(module: nn.Module) -> nn.Module:
    """``copy.deepcopy``, also of modules with a computed weight as attribute, as old-style weight norm has."""
    computed = {
        id(value): value.detach().clone()
        for inner in module.modules()
        for value in vars(inner).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(module, computed)
