"""The base of the hooks that fill the views of one recorder."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_otrt.reading.hooks.own_hook import OwnHook
from lightning_otrt.reading.torch_internals import is_in_backward

if TYPE_CHECKING:
    from lightning_otrt.reading.hooks.recorder import Recorder
    from lightning_otrt.reading.hooks.views import View

__all__ = ["RecorderHook", "uncounted_saved_tensors"]


class RecorderHook(OwnHook):
    """A hook that belongs to one recorder."""

    recorder: Recorder

    def open_view(self, side: str) -> View | None:
        """The view that a call in a network of this side fills; None if it belongs to no recorded forward."""
        recorder = self.recorder
        # In the backward pass activation checkpointing runs layers and their hooks again.
        if recorder.current is None or recorder.nested or is_in_backward():
            return None
        return recorder.current if side == "student" or recorder.runs_teacher else None


def uncounted_saved_tensors() -> AbstractContextManager[Any]:
    """Keep the tensors that a reading saves out of the count that activation checkpointing compares.

    The recomputation in the backward pass makes no reading, so that the two counts would differ.
    """
    return nullcontext() if torch.compiler.is_compiling() else saved_tensors_hooks(_unchanged, _unchanged)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
