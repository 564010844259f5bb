"""The base of hooks on a user's modules: copies of the modules lose them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_otrt.reading.torch_internals import remove_hook

__all__ = ["FunctionHook", "OwnHook"]


class OwnHook:
    """A hook that belongs to one module.

    Copies and pickles of a hooked module (weight averaging, checkpoints of whole modules) must not record, and must not
    copy the teacher. They get a hook in its place that does nothing but take itself off.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _HookOfCopy:
        return _HookOfCopy()

    def __reduce__(self) -> tuple[Any, ...]:
        return _HookOfCopy, ()


class FunctionHook(OwnHook):
    """An own hook that calls a function.

    Args:
        function: Gets the arguments of the hook, and returns what it returns.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        return self.function(*arguments)


class _HookOfCopy:
    """Stands in place of a hook on a copy of its module, and takes itself off in the first forward of the copy."""

    def __call__(self, module: nn.Module, *inputs_and_output: Any) -> None:
        if not torch.compiler.is_compiling():
            remove_hook(module, self)
