"""Layers whose module was replaced by another one after the hooks were put on it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.reading.recorder import Readers

__all__ = ["replaced_layers"]


def replaced_layers(side: str, model: nn.Module, readers: Readers, absent: Iterable[int]) -> list[str]:
    """Names of the layers that did not run, and of which the model has another module now.

    Args:
        side: ``"student"`` or ``"teacher"``, for errors.
        model: The network of that side.
        readers: What is recorded of it, by the number of the pair.
        absent: Numbers of the pairs of which a layer did not run.

    Raises:
        ValueError: If the model has no module of that name any more.
    """
    modules = named_layers(model)
    found = []
    for index in absent:
        recorded = readers[str(index)]
        name = recorded.name.removesuffix(INPUT)
        if name not in modules:
            raise ValueError(
                f"The {side} layer {recorded.name!r} is no longer in the {side} ({type(model).__name__}): a module of "
                "that name was there when the layers were chosen, and was removed since. Detach the transfer, and "
                "attach one whose layers exist."
            )
        if modules[name] is not recorded.module:
            found.append(recorded.name)
    return found
