"""The only uses of private parts of torch on this floor: what torch has no public function for.

``tests/reading/test_torch_internals.py`` fails where a new version of torch changes one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["add_forward_hook", "add_forward_pre_hook", "all_buffers", "is_compiled", "is_in_backward"]


def is_in_backward() -> bool:
    """Whether this code runs inside a backward pass, as the recomputation of activation checkpointing does.

    ``torch.utils.checkpoint`` uses the same private function, which returns -1 outside of a backward pass.
    ``torch.compile`` cannot compile it; code that is being compiled is in a forward.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def all_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers by name. Unlike ``named_buffers`` it includes those that are None."""
    return dict(module._buffers.items())


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``module.compile`` was called on the module or a part of it."""
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in module.modules())


def add_forward_hook(module: nn.Module, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
    """``module.register_forward_hook``, which script modules refuse although calls of theirs from Python run hooks.

    Hooks of modules that TorchScript calls inside itself do not run.
    """
    return nn.Module.register_forward_hook(module, hook, **options)


def add_forward_pre_hook(module: nn.Module, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
    """The same for ``module.register_forward_pre_hook``."""
    return nn.Module.register_forward_pre_hook(module, hook, **options)
