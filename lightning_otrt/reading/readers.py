"""How the output of a traced layer is read: what the trace tells a :class:`NeuronReader`."""

from __future__ import annotations

import math
import warnings

from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor
from lightning_otrt.reading.neurons import NeuronReader

__all__ = ["layer_reader"]


def layer_reader(
    side: str, trace: Trace, name: str, axis: int | None, grid: int | None, select: str | int | None = None
) -> NeuronReader:
    """The reader of one layer.

    Args:
        side: ``"student"`` or ``"teacher"``, for errors.
        trace: Trace of its network.
        name: ``"name"`` or ``"name:input"``.
        axis: Axis of the neurons.
        grid: See :func:`~lightning_otrt.reading.neurons.neurons`.
        select: Key or index of the tensor, where the layer gives several.
    """
    tensor = trace.tensor(name, select)
    where = f"{side} layer {name!r}"
    prefix, token_grid = 0, None
    if tensor is not None and len(tensor.shape) == 3 and axis in (2, -1):
        prefix, token_grid = _token_grid(trace, trace.layer(name), tensor, where)
    return NeuronReader(
        layer=where,
        neuron_axis=axis,
        batch_axis=0 if tensor is None else tensor.batch_axis,
        grid=grid,
        prefix_tokens=prefix,
        token_grid=token_grid,
        select=None if name.endswith(INPUT) else select,
    )


def _token_grid(
    trace: Trace, layer: TracedLayer, tensor: TracedTensor, where: str
) -> tuple[int, tuple[int, int] | None]:
    """How many tokens are a prefix, and the rows and columns of the others where they come from the cells of a map.

    The map is that of a patch embedding or of a convolution before the layer. A number of tokens that no such map has
    is no grid, even if it is a square: masked autoencoders keep a random part of the patches.
    """
    tokens = tensor.shape[1 - tensor.batch_axis]
    maps = [size for earlier in _before(trace, layer) if (size := _map_size(earlier, trace)) is not None]
    if not maps:
        return 0, None
    # The declared prefix first, then none: some models add it after this layer.
    for prefix in dict.fromkeys((trace.prefix_tokens, 0)):
        for rows, columns in reversed(maps):
            if rows * columns == tokens - prefix:
                return prefix, (rows, columns)
    prefix = trace.prefix_tokens if tokens > trace.prefix_tokens else 0
    if any(math.prod(size) > tokens - prefix for size in maps[-1:]):
        warnings.warn(
            f"The {where} has {tokens - prefix} tokens, but the patches before it are a grid of "
            f"{maps[-1][0]} x {maps[-1][1]}. They are read as a sequence. If the network takes a random part of them, "
            "as masked autoencoders do, their order means nothing: match layers without positions, or pass grid=1.",
            stacklevel=2,
        )
    return prefix, None


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
