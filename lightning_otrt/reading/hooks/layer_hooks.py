"""Hooks that read the neurons of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import MaskSource
from lightning_otrt.reading.hooks.recorder_hook import RecorderHook, uncounted_saved_tensors
from lightning_otrt.reading.hooks.step_mask import StepMask
from lightning_otrt.reading.neurons.nested import pad_nested
from lightning_otrt.reading.neurons.outputs import packed_mask, select_tensor, sequence_output
from lightning_otrt.reading.neurons.reader import NeuronReader
from lightning_otrt.reading.torch_internals import is_in_functional_transform
from lightning_otrt.reading.traced.arguments import entered_tensor

if TYPE_CHECKING:
    from lightning_otrt.reading.hooks.recorder import Recorder

__all__ = ["ReadInput", "ReadOutput"]


class _Read(RecorderHook):
    """Reads a layer.

    Args:
        recorder: Its recorder.
        side: ``"student"`` or ``"teacher"``.
        index: The number of the pair; None for the layer on which logits are regressed.
        reader: Reads the layer.
        masks: Where its padding masks may come from, the nearest first, with the modules that get them.
        grid: Key of the rows and columns of its tokens in a view, where they have some.
    """

    def __init__(
        self,
        recorder: Recorder,
        side: str,
        index: int | None,
        reader: NeuronReader,
        masks: Sequence[tuple[MaskSource, nn.Module]] = (),
        grid: str | None = None,
    ) -> None:
        self.recorder, self.side, self.index, self.reader, self.grid = recorder, side, index, reader, grid
        self.mask = StepMask(side, reader, masks) if masks else None

    def read(self, value: Any, own_mask: Tensor | None = None) -> None:
        """Add the reading of a layer's value to the current view; a mask of its own comes before the others."""
        view = self.open_view(self.side)
        if view is None:
            return
        # Those of the teacher are read all the same: what is kept of a sample may serve another run.
        if self.side == "student" and not self.recorder.reads_pairs and self.index is not None:
            return
        if is_in_functional_transform():
            raise RuntimeError(
                f"The {self.reader.layer} runs inside a transform of torch.func (vmap, jvp, grad, ...) of the network, "
                "and its tensors cannot leave it. Name a layer that the network calls outside of the transform."
            )
        with uncounted_saved_tensors():
            tensor = select_tensor(value, self.reader.select, where=self.reader.layer)
            if tensor.is_nested:
                tensor, own_mask = pad_nested(tensor, None if self.mask is None else self.mask.length(view))
            mask = self.mask(view, tensor) if own_mask is None and self.mask is not None else own_mask
            reading = self.reader(tensor, mask, None if self.grid is None else view.grids.get(self.grid))
        if self.index is None:
            view.features.append(reading)
        else:
            readings = view.student if self.side == "student" else view.teacher
            readings.setdefault(self.index, []).append(reading)


class ReadOutput(_Read):
    """Forward hook that reads the output of a layer."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Read the output."""
        if isinstance(output, Tensor):
            self.read(output)
        else:
            self.read(sequence_output(module, output), packed_mask(output))


class ReadInput(_Read):
    """Forward pre-hook that reads the first tensor that enters a layer."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the input."""
        self.read(entered_tensor(args, kwargs))
