"""A warning where other code trains the teacher while it is kept in evaluation mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_otrt.notices import warn
from lightning_otrt.reading.hooks.own_hook import OwnHook

__all__ = ["TrainedElsewhere"]


class TrainedElsewhere(OwnHook):
    """Forward pre-hook of a teacher: warns once of a forward with gradient, which cannot be one of the transfer."""

    def __init__(self) -> None:
        self._has_warned = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Look at a forward."""
        if torch.compiler.is_compiling() or self._has_warned:
            return
        is_trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
        if is_trained and not module.training:
            self._has_warned = True
            warn(
                f"Other code runs the teacher ({type(module).__name__}) with gradient while it is attached. The "
                "transfer keeps it in evaluation mode: dropout is off, and batch normalisation learns no statistics. "
                "Where it is trained in the same loop, call `train()` on it before each of its own forwards; else run "
                "it inside `torch.no_grad()`.",
            )
