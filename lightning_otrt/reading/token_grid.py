"""The grid of tokens that come from the patches of a map, as far as the traced forward shows it."""

from __future__ import annotations

import math
from typing import NamedTuple

from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor

__all__ = ["TokenGrid", "find_token_grid"]


class TokenGrid(NamedTuple):
    """How the tokens of a layer lie.

    Attributes:
        prefix: Number of class and register tokens in front.
        size: Rows and columns of the others, None for a sequence.
        part_of: Rows and columns of the patches before the layer, where it has fewer tokens than these.
    """

    prefix: int = 0
    size: tuple[int, int] | None = None
    part_of: tuple[int, int] | None = None


def find_token_grid(trace: Trace, layer: TracedLayer, tensor: TracedTensor) -> TokenGrid:
    """How many tokens are a prefix, and the rows and columns of the others where they come from the cells of a map.

    The map is that of a patch embedding or of a convolution before the layer. A number of tokens that no such map has
    is no grid, even if it is a square: masked autoencoders keep a random part of the patches.

    Args:
        trace: Trace of the network.
        layer: The layer.
        tensor: What it gives, or what enters it: ``(B, T, C)`` or ``(T, B, C)``.
    """
    tokens = tensor.shape[1 - tensor.batch_axis]
    maps = [size for earlier in _before(trace, layer) if (size := _map_size(earlier, trace)) is not None]
    if not maps:
        return TokenGrid()
    # The declared prefix first, then none: some models add it after this layer.
    for prefix in dict.fromkeys((trace.prefix_tokens, 0)):
        for rows, columns in reversed(maps):
            if rows * columns == tokens - prefix:
                return TokenGrid(prefix, (rows, columns))
    prefix = trace.prefix_tokens if tokens > trace.prefix_tokens else 0
    return TokenGrid(prefix, part_of=maps[-1] if math.prod(maps[-1]) > tokens - prefix else None)


def _before(trace: Trace, layer: TracedLayer) -> list[TracedLayer]:
    """The layers that ran before this one and may lead to it, in order.

    Layers of another tower are left out: inside a module that takes an input of the whole model (a text encoder), what
    ran before that module (an image encoder) does not lead to it.
    """
    parts = layer.name.split(".")
    towers = [".".join(parts[:end]) for end in range(1, len(parts))]
    inside = [f"{name}." for name in towers if trace.layer(name).takes_model_input and name != trace.root]
    ran = [
        other
        for other in trace.layers
        if other.order is not None
        and other.order < (layer.order or 0)
        and all(other.name.startswith(prefix) for prefix in inside)
    ]
    return sorted(ran, key=lambda other: other.order or 0)


def _map_size(layer: TracedLayer, trace: Trace) -> tuple[int, int] | None:
    """Rows and columns of a layer that gives a map of each sample."""
    tensor = layer.output
    if tensor is None or tensor.neuron_axis is None or len(tensor.shape) != 4 or tensor.shape[0] != trace.batch_size:
        return None
    rows, columns = tensor.positions
    return rows, columns
