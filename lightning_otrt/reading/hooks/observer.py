"""Reads layers of one network in forwards that are not part of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.hooks.readers import TracedRead, recorded_layer
from lightning_otrt.reading.hooks.recorder import Recorder
from lightning_otrt.reading.masks.layer_masks import layer_masks
from lightning_otrt.reading.masks.warnings import warn_of_unused_masks

__all__ = ["Observer"]


class Observer:
    """Runs a network and returns the readings of its layers; :meth:`remove` removes the hooks.

    Args:
        side: ``"student"`` or ``"teacher"``, for errors.
        model: The network.
        trace: Trace of the network.
        layers: Names with their neuron axes.
        grid: See :func:`~lightning_otrt.reading.neurons.reader.neurons`.
    """

    def __init__(self, side: str, model: nn.Module, trace: Trace, layers: Mapping[str, int], grid: int | None) -> None:
        modules = named_layers(model)
        self.side, self.names = side, tuple(layers)
        self._recorder = Recorder(lambda *_: False)
        self._recorder.watch_student(
            {
                index: recorded_layer(TracedRead(side, trace, name, axis), modules, grid)
                for index, (name, axis) in enumerate(layers.items())
            }
        )
        warn_of_unused_masks(side, {name: layer_masks(side, trace, name, axis) for name, axis in layers.items()})

    def __call__(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        method_of: nn.Module | None = None,
    ) -> dict[str, Tensor]:
        """Readings ``(B, C, *positions)`` by name of the forward ``run(*args, **kwargs)``.

        Args:
            run: What to call.
            args: Positional arguments.
            kwargs: Keyword arguments.
            method_of: The module whose method it is. No hook of the module notes the masks of such a call.

        Raises:
            ValueError: If a layer does not run exactly once.
        """
        view = self._recorder.open()
        try:
            if method_of is not None:
                self._recorder.note_masks(method_of, args, dict(kwargs))
            run(*args, **kwargs)
        finally:
            self._recorder.close()
        for index, name in enumerate(self.names):
            calls = len(view.student.get(index, ()))
            if calls != 1:
                raise ValueError(
                    f"The {self.side} layer {name!r} ran {calls} times in this forward, but once in the first one. A "
                    "representation is one call; leave the layer out, or name its parent."
                )
        return {self.names[index]: calls[0] for index, calls in view.student.items()}

    def remove(self) -> None:
        """Remove the hooks."""
        self._recorder.remove()
