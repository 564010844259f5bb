"""The warning where a recorded layer has other positions in training than in evaluation, on the same batch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace, TracedTensor
from lightning_otrt.notices import warn
from lightning_otrt.reading.torch_internals import add_forward_hook

__all__ = ["FirstShapes"]


class FirstShapes:
    """Compares the shapes of recorded layers in the traced forward and in the first training forward.

    Code may drop tokens, or cut maps, in training alone and behind the first layer. No hook is left after the step.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._others: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        #: The layers that have run. A second forward of the step may be one of other samples.
        self._seen: set[str] = set()

    def compare_next(self, trace: Trace, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Note the shapes in the next forward.

        Args:
            trace: The traced forward of the same batch.
            modules: The recorded layers by name.
        """
        for name, module in modules:
            layer = None if name.endswith(INPUT) else trace.layer(name)
            if layer is not None and layer.output is not None and layer.output.positions and not layer.has_own_mask:
                self._handles.append(add_forward_hook(module, partial(self._note, name, layer.output)))

    def take_warning(self) -> None:
        """Remove the hooks, and warn of layers with other positions."""
        others = self._others
        self.forget()
        if others:
            (name, (in_training, traced)), *_ = others.items()
            warn(
                f"The student layers {list(others)} have other positions in training than in evaluation mode, on the "
                f"same batch: {name!r} has {in_training} in training and {traced} in evaluation mode. The teacher runs "
                "in evaluation mode, so the two networks are averaged over different places. This happens where the "
                "forward drops tokens. Change the batch before the network, or match layers without positions, such as "
                "'penultimate'.",
            )

    def forget(self) -> None:
        """Remove the hooks, and what they noted."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._others, self._seen = [], {}, set()

    def _note(self, name: str, traced: TracedTensor, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or name in self._seen:
            return
        self._seen.add(name)
        if not isinstance(output, Tensor) or output.dim() != len(traced.shape):
            return
        found = tuple(
            size for axis, size in enumerate(output.shape) if axis not in (traced.batch_axis, traced.neuron_axis)
        )
        if found != traced.positions:
            self._others[name] = found, traced.positions

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstShapes:
        """The same object: a copy that is made during the first step is not watched."""
        return self
