"""The only uses of private parts of torch on this floor: what torch has no public function for.

``tests/reading/test_torch_internals.py`` fails where a new version of torch changes one of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["all_buffers", "is_compiled", "is_in_backward"]


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
