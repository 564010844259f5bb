"""How the output of a traced layer is read: what the trace tells a :class:`NeuronReader`."""

from __future__ import annotations

import math

from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace
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
    prefix, token_grid = 0, None
    if tensor is not None and len(tensor.shape) == 3 and axis in (2, -1) and trace.image_size is not None:
        tokens = tensor.shape[1 - tensor.batch_axis]
        prefix, token_grid = _token_grid(tokens, trace.prefix_tokens, trace.image_size)
    return NeuronReader(
        layer=f"{side} layer {name!r}",
        neuron_axis=axis,
        batch_axis=0 if tensor is None else tensor.batch_axis,
        grid=grid,
        prefix_tokens=prefix,
        token_grid=token_grid,
        select=None if name.endswith(INPUT) else select,
    )


def _token_grid(tokens: int, declared: int, image: tuple[int, int]) -> tuple[int, tuple[int, int] | None]:
    """How many tokens of an image are a prefix, and the rows and columns of the others.

    The declared prefix is tried first, then none: some models add it after this layer.
    """
    for prefix in dict.fromkeys((declared, 0)):
        left = tokens - prefix
        if left < 1:
            continue
        rows = round(math.sqrt(left * image[0] / image[1]))
        if rows and left % rows == 0 and math.isclose(rows * image[1], left // rows * image[0], rel_tol=0.1):
            return prefix, (rows, left // rows)
    return declared if tokens > declared else 0, None
