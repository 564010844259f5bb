"""The mask of a recorded layer in one step: the nearest of those noted in the view that has the layer's length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import MaskSource
from lightning_otrt.notices import Notices, warn
from lightning_otrt.reading.hooks.note_hooks import mask_key
from lightning_otrt.reading.hooks.views import View
from lightning_otrt.reading.masks.values import fit_mask
from lightning_otrt.reading.neurons.reader import NeuronReader

__all__ = ["StepMask"]

#: Steps between two looks at masks that left out nothing at first; before that at each power of two.
_LOOKS_EVERY = 64


class StepMask:
    """Finds the mask of a layer in a view. What only a later batch shows to be wrong is warned of once.

    Args:
        side: ``"student"`` or ``"teacher"``.
        reader: Reads the layer.
        masks: Where its masks may come from, the nearest first, with the modules that get them.
    """

    def __init__(self, side: str, reader: NeuronReader, masks: Sequence[tuple[MaskSource, nn.Module]]) -> None:
        self.reader = reader
        self.masks = [(mask_key(side, source), source, module) for source, module in masks]
        self._notices, self.has_looked = Notices(), False
        #: Of masks that left out nothing at first: the number of steps, and whether one left out something since.
        self._full: dict[MaskSource, tuple[int, Tensor]] = {}
        self._told: set[MaskSource] = set()

    def length(self, view: View) -> int | None:
        """The number of tokens of the nearest mask; None without one."""
        noted = (view.masks.get(key) for key, _, _ in self.masks)
        return next((mask.shape[1] for mask in noted if mask is not None), None)

    def __call__(self, view: View, tensor: Tensor) -> Tensor | None:
        """The mask ``(B, T)`` of this step, true where a token is valid; None if there is none for the layer."""
        size = self.reader.sequence_size(tensor)
        if size is None and self.masks and not self.has_looked:
            self._look_at_late_mask(view, tensor)
        misfit = None
        for key, source, module in self.masks:
            mask = view.masks.get(key)
            if mask is None or size is None:
                continue
            fitted = fit_mask(mask, *size, self.reader.prefix_tokens, module)
            if source.is_full:
                self._look_for_padding(source, fitted)
                continue
            if source.true_at == "unknown":
                self._warn_of_unknown(source, fitted)
                continue
            if fitted is not None:
                return fitted
            misfit = f"The mask {source.argument!r} has the shape {tuple(mask.shape)}, but {self.reader.layer} has "
            misfit += f"{size[1]} positions of {size[0]} samples"
            if source.is_named:
                raise ValueError(f"{misfit}. Name its own mask with LayerPair(mask=...), or pass mask=None.")
        if misfit is not None:
            message = f"{misfit}, so that its padding is not left out. LayerPair(mask=...) names one."
            self._notices.warn(message, key="unused")
        return None

    def _look_at_late_mask(self, view: View, tensor: Tensor) -> None:
        """Warn where a mask that the first batch did not have leaves out tokens that are read as a map."""
        if tensor.dim() != 3 or torch.compiler.is_compiling():
            return
        samples, tokens = tensor.shape[self.reader.batch_axis], tensor.shape[1 - self.reader.batch_axis]
        for key, source, module in self.masks:
            mask = view.masks.get(key)
            if mask is None or source.true_at == "unknown":
                continue
            self.has_looked = True  # once: looking at values waits for the device
            fitted = fit_mask(mask, samples, tokens, self.reader.prefix_tokens, module)
            if fitted is not None and bool((~fitted).any()):
                warn(
                    f"The mask {source.argument!r}, which the first batch did not have, leaves out tokens of "
                    f"{self.reader.layer}, which are the patches of a map and are pooled like one: their padding is "
                    "read. LayerPair(mask=None) says that this is meant.",
                )

    def _look_for_padding(self, source: MaskSource, fitted: Tensor | None) -> None:
        """Warn where a mask that left out nothing at first leaves out some of a sample, whatever it means by that.

        Each step notes it on the device. The host looks less and less often, since that waits; in compiled code never.
        """
        if fitted is None or source in self._told or torch.compiler.is_compiling():
            return
        left_out = (fitted.any(1) & ~fitted.all(1)).any()
        calls, seen = self._full.get(source, (0, left_out))
        calls, seen = calls + 1, seen | left_out
        self._full[source] = calls, seen
        if calls == 1 and bool(seen):  # on the batch of the trace: drawn anew in training, as for dropped tokens
            self._told.add(source)
            return
        is_power = calls & (calls - 1) == 0
        if (is_power or calls % _LOOKS_EVERY == 0) and bool(seen):
            self._told.add(source)
            name = source.argument
            self._notices.warn(
                f"The argument {name!r} of {source.module or 'the network'!r}, which left out no token in the first "
                f"batch, leaves out some now. It is not known whether it is the padding mask of {self.reader.layer}, "
                f'and it is not used: pass LayerPair(mask="{name}") if it is, and true at valid tokens, mask="~{name}" '
                "if it is true at padding, or mask=None to read padding.",
                key="unused",
            )

    def _warn_of_unknown(self, source: MaskSource, fitted: Tensor | None) -> None:
        if fitted is None:
            return
        name = source.argument
        self._notices.warn(
            f"The argument {name!r}, which the first batch did not have, may be the padding mask of "
            f"{self.reader.layer}, but its name does not tell whether it marks valid tokens or padding. It is not "
            f'used: pass LayerPair(mask="{name}") if it is true at valid tokens, mask="~{name}" if it is true at '
            "padding, or mask=None.",
            key="unused",
        )
