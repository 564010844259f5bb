"""Layers whose module was replaced by another one after the hooks were put on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.reading.hooks.recorder import Readers
from lightning_otrt.reading.torch_internals import child_of

__all__ = ["moved_pairs", "parents_of", "replaced_layers"]


def parents_of(model: nn.Module, readers: Readers) -> dict[int, tuple[nn.Module, str]]:
    """For each pair the module that holds its layer, and the layer's name there; without those that none holds."""
    wanted = {id(recorded.module): index for index, recorded in readers.items()}
    found: dict[int, tuple[nn.Module, str]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            if id(child) in wanted:
                found[wanted[id(child)]] = parent, name
    return found


def moved_pairs(parents: Mapping[int, tuple[nn.Module, str]], readers: Readers) -> list[int]:
    """Numbers of the pairs whose layer is no longer where it was; cheap, for each step."""
    return [index for index, (parent, name) in parents.items() if child_of(parent, name) is not readers[index].module]


def replaced_layers(side: str, model: nn.Module, readers: Readers, suspects: Iterable[int]) -> list[str]:
    """Names of those of the layers of which the model has another module now.

    Args:
        side: ``"student"`` or ``"teacher"``, for errors.
        model: The network of that side.
        readers: What is recorded of it, by the number of the pair.
        suspects: Numbers of the pairs of which a layer did not run, or is no longer where it was.

    Raises:
        ValueError: If the model has no module of that name any more.
    """
    modules = named_layers(model)
    found = []
    for index in suspects:
        recorded = readers[index]
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
