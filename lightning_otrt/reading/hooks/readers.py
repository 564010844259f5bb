"""How the output of a traced layer is read: what the trace tells a :class:`NeuronReader`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from torch import nn

from lightning_otrt.layers.mask_sources import LayerMasks
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.hooks.recorder import PatchMap, RecordedLayer
from lightning_otrt.reading.masks.layer_masks import layer_masks
from lightning_otrt.reading.neurons.reader import NeuronReader
from lightning_otrt.reading.traced.token_grid import TokenGrid, find_token_grid

__all__ = ["layer_reader", "recorded_layer"]


def recorded_layer(
    side: str,
    trace: Trace,
    modules: Mapping[str, nn.Module],
    name: str,
    axis: int | None,
    grid: int | None,
    select: str | int | None = None,
    mask: str | None = "auto",
) -> RecordedLayer:
    """What to record of one layer: its module, its reader, and the modules that get its padding mask.

    Args:
        side: See :func:`layer_reader`.
        trace: See :func:`layer_reader`.
        modules: All modules of the network by name.
        name: See :func:`layer_reader`.
        axis: See :func:`layer_reader`.
        grid: See :func:`layer_reader`.
        select: See :func:`layer_reader`.
        mask: See :class:`~lightning_otrt.layers.pairs.LayerPair`.
    """
    masks = layer_masks(side, trace, name, axis, select, mask)
    layout = _token_layout(trace, name, axis, select, masks)
    reader = layer_reader(side, trace, name, axis, grid, select, masks)
    sources = tuple((source, modules[source.module]) for source in masks.sources)
    return RecordedLayer(name, modules[name.removesuffix(INPUT)], reader, sources, _patches(trace, modules, layout))


def layer_reader(
    side: str,
    trace: Trace,
    name: str,
    axis: int | None,
    grid: int | None,
    select: str | int | None = None,
    masks: LayerMasks = LayerMasks(),  # noqa: B008
) -> NeuronReader:
    """The reader of one layer.

    Args:
        side: ``"student"`` or ``"teacher"``, for errors.
        trace: Trace of its network.
        name: ``"name"`` or ``"name:input"``.
        axis: Axis of the neurons.
        grid: See :func:`~lightning_otrt.reading.neurons.reader.neurons`.
        select: Key or index of the tensor, where the layer gives several.
        masks: Its padding masks.
    """
    tensor = trace.tensor(name, select)
    where = f"{side} layer {name!r}"
    layout = _token_layout(trace, name, axis, select, masks)
    if layout.part_of is not None and tensor is not None:
        warnings.warn(
            f"The {where} has {tensor.shape[1 - tensor.batch_axis] - layout.prefix} tokens, but the patches before it "
            f"are a grid of {' x '.join(map(str, layout.part_of))}. They are read as a sequence. If the network "
            "takes a random part of them, as masked autoencoders do, their order means nothing: match layers without "
            "positions, or pass grid=1.",
            stacklevel=2,
        )
    if layout.more_than is not None and tensor is not None:
        tokens, size = tensor.shape[1 - tensor.batch_axis], layout.more_than
        warnings.warn(
            f"The {where} has {tokens} tokens, {tokens - math.prod(size)} more than the grid of "
            f"{' x '.join(map(str, size))} patches before it, and it is not known where they stand. All are "
            "read as a sequence. If they stand in front, call their parameters cls_token and register_tokens in the "
            "network; else match layers without positions, or pass grid=1.",
            stacklevel=2,
        )
    if layout.unordered is not None and tensor is not None:
        warnings.warn(
            f"The {where} has {tensor.shape[1 - tensor.batch_axis]} tokens of a grid of "
            f"{' x '.join(map(str, layout.unordered))} patches, but a change of one patch does not show that they lie "
            "row by row: they may be queries that look at the patches, or patches in the order of windows. They are "
            "read as a sequence. Match layers that give maps, or networks with the same order, or pass grid=1.",
            stacklevel=2,
        )
    if layout.frames is not None:
        count, size = layout.frames[0], layout.frames[1:]
        warnings.warn(
            f"The {where} has the patches of {count} frames, each of {' x '.join(map(str, size))}, and it is not known "
            "whether frames or patches come first. They are read as a sequence: match layers of networks with the same "
            "order, or pass grid=1.",
            stacklevel=2,
        )
    return NeuronReader(
        layer=where,
        neuron_axis=axis,
        batch_axis=0 if tensor is None else tensor.batch_axis,
        grid=grid,
        prefix_tokens=layout.prefix,
        token_grid=layout.size,
        select=None if name.endswith(INPUT) else select,
    )


def _token_layout(trace: Trace, name: str, axis: int | None, select: str | int | None, masks: LayerMasks) -> TokenGrid:
    """How the tokens of a layer lie; none of it for layers of other shapes."""
    tensor = trace.tensor(name, select)
    if masks.used is not None:  # a grid has no padding
        return TokenGrid(trace.prefix_tokens if masks.drops_prefix else 0)
    if tensor is not None and len(tensor.shape) == 3 and axis in (2, -1):
        return find_token_grid(trace, trace.layer(name), tensor)
    return TokenGrid()


def _patches(trace: Trace, modules: Mapping[str, nn.Module], layout: TokenGrid) -> PatchMap | None:
    """The layer that gives the map of the tokens."""
    if layout.size is None:
        return None
    output = trace.layer(layout.source).output
    neurons = None if output is None else output.neuron_axis
    axes = tuple(sorted(set(range(1, len(layout.size) + 2)) - {neurons}))
    return PatchMap(layout.source, modules[layout.source], axes, layout.merged)
