"""The base of hooks on a user's modules: copies of the modules lose them."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from lightning_otrt.reading.torch_internals import remove_hook

__all__ = ["OwnHook"]

_OwnHook = TypeVar("_OwnHook", bound="OwnHook")


class OwnHook:
    """A hook that belongs to one module.

    Copies and pickles of a hooked module (weight averaging, checkpoints of whole modules) get a hook that does nothing
    but take itself off in their first forward: they must not record, and must not copy the teacher.
    """

    @property
    def is_live(self) -> bool:
        """Whether it has what it was made with. That of a copy has nothing."""
        raise NotImplementedError

    def leaves_copy(self, module: nn.Module) -> bool:
        """Whether it is on a copy of its module; it takes itself off there."""
        if self.is_live:
            return False
        if not torch.compiler.is_compiling():
            remove_hook(module, self)
        return True

    def __deepcopy__(self: _OwnHook, memo: dict[int, Any]) -> _OwnHook:
        return type(self).__new__(type(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (type(self),)
