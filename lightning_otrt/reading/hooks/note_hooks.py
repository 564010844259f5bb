"""Hooks that put into the view what the readers of layers need: padding masks, and rows and columns of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import MaskSource
from lightning_otrt.reading.hooks.recorder_hook import RecorderHook
from lightning_otrt.reading.masks.values import as_rows, valid_tokens
from lightning_otrt.reading.traced.arguments import argument_position, items_by_name

if TYPE_CHECKING:
    from lightning_otrt.reading.hooks.recorder import PatchMap, Recorder

__all__ = ["NoteGrid", "NoteMask", "grid_key", "mask_key"]


class NoteMask(RecorderHook):
    """Forward pre-hook of a module that gets a padding mask: puts the mask into the current view."""

    def __init__(self, recorder: Recorder, side: str, source: MaskSource, module: nn.Module) -> None:
        self.recorder, self.side, self.source, self.key = recorder, side, source, mask_key(side, source)
        # Looked up once: the signature of a forward is slow to read, and compiled code could not do it.
        self.position = argument_position(module, source.argument, source.method)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the mask of this forward."""
        view = self.open_view(self.side)
        if view is None:
            return
        name = self.source.argument
        value = kwargs.get(name)
        if value is None and self.position is not None and self.position < len(args):
            value = args[self.position]
        if value is None:
            wholes = map(items_by_name, (*args, *kwargs.values()))
            value = next((whole[name] for whole in wholes if name in whole), None)
        mask = as_rows(value, self.source)
        view.masks[self.key] = None if mask is None else valid_tokens(mask, self.source)


class NoteGrid(RecorderHook):
    """Forward hook of a layer that gives the map from which tokens come: puts their rows and columns into the view."""

    def __init__(self, recorder: Recorder, side: str, patches: PatchMap) -> None:
        self.recorder, self.side, self.key = recorder, side, grid_key(side, patches)
        self.axes, self.merged = patches.axes, patches.merged

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note the size of this forward."""
        view = self.open_view(self.side)
        if view is None:
            return
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.dim() == len(self.axes) + 2:
            view.grids[self.key] = tuple(tensor.shape[axis] // self.merged for axis in self.axes)


def grid_key(side: str, patches: PatchMap) -> str:
    """The key of the rows and columns of tokens in a view."""
    return f"{side} {patches.name} / {patches.merged}"


def mask_key(side: str, source: MaskSource) -> str:
    """The key of a mask in a view."""
    return f"{side} {source.module}({source.argument}) {source.true_at}"
