"""Layers whose module was replaced by another one after the hooks were put on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from torch import nn

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.reading.hooks.recorder import Readers
from lightning_otrt.reading.torch_internals import child_of

__all__ = ["Places", "moved_pairs", "places_of", "replaced_layers"]


class Place(NamedTuple):
    """Where a recorded module is.

    Attributes:
        parent: The module that holds it.
        name: Its name there.
        module: The recorded module.
    """

    parent: nn.Module
    name: str
    module: nn.Module


#: The places of recorded modules by the number of the pair.
Places: TypeAlias = Mapping[int, Place]


def places_of(model: nn.Module, readers: Readers) -> Places:
    """For each pair where its layer is; without those that no module holds."""
    wanted = {id(recorded.module): index for index, recorded in readers.items()}
    found: dict[int, Place] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            if id(child) in wanted:
                found[wanted[id(child)]] = Place(parent, name, child)
    return found


def moved_pairs(*sides: Places) -> set[int]:
    """Numbers of the pairs whose layer is no longer where it was; cheap, for each step."""
    places = (item for side in sides for item in side.items())
    return {index for index, (parent, name, module) in places if child_of(parent, name) is not module}


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
