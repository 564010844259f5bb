"""How the output of a traced layer is read: what the trace tells a :class:`NeuronReader`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lightning_otrt.layers.mask_sources import LayerMasks
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace, TracedTensor
from lightning_otrt.notices import warn
from lightning_otrt.reading.hooks.recorder import PatchMap, RecordedLayer
from lightning_otrt.reading.masks.layer_masks import layer_masks
from lightning_otrt.reading.neurons.reader import NeuronReader
from lightning_otrt.reading.traced.token_grid import TokenGrid, find_token_grid

__all__ = ["TracedRead", "layer_reader", "recorded_layer", "token_layout"]


@dataclass(frozen=True)
class TracedRead:
    """Which tensor of a traced network is read.

    Args:
        side: ``"student"`` or ``"teacher"``, for errors.
        trace: Trace of the network.
        name: ``"name"`` or ``"name:input"``.
        axis: Axis of the neurons.
        select: Key or index of the tensor, where the layer gives several.
        mask: See :class:`~lightning_otrt.layers.pairs.LayerPair`.
    """

    side: str
    trace: Trace
    name: str
    axis: int | None
    select: str | int | None = None
    mask: str | None = "auto"

    @property
    def tensor(self) -> TracedTensor | None:
        """The tensor in the trace."""
        return self.trace.tensor(self.name, self.select)

    @property
    def where(self) -> str:
        """How errors name the layer."""
        return f"{self.side} layer {self.name!r}"


def recorded_layer(read: TracedRead, modules: Mapping[str, nn.Module], grid: int | None) -> RecordedLayer:
    """What to record of one layer: its module, its reader, and the modules that get its padding mask.

    Args:
        read: What is read.
        modules: All modules of the network by name.
        grid: See :func:`~lightning_otrt.reading.neurons.reader.neurons`.
    """
    masks = layer_masks(read.side, read.trace, read.name, read.axis, read.select, read.mask)
    layout = token_layout(read, masks)
    sources = tuple((source, modules[source.module]) for source in masks.sources)
    module = modules[read.name.removesuffix(INPUT)]
    patches = _patches(read.trace, modules, layout)
    return RecordedLayer(read.name, module, layer_reader(read, layout, grid), sources, patches)


def layer_reader(read: TracedRead, layout: TokenGrid, grid: int | None) -> NeuronReader:
    """The reader of one layer. It warns of tokens whose order is not known.

    Args:
        read: What is read.
        layout: How its tokens lie, see :func:`token_layout`.
        grid: See :func:`~lightning_otrt.reading.neurons.reader.neurons`.
    """
    tensor, where = read.tensor, read.where
    if layout.part_of is not None and tensor is not None:
        warn(
            f"The {where} has {tensor.shape[1 - tensor.batch_axis] - layout.prefix} tokens, but the patches before it "
            f"are a grid of {' x '.join(map(str, layout.part_of))}. They are read as a sequence. If the network "
            "takes a random part of them, as masked autoencoders do, their order means nothing: match layers without "
            "positions, or pass grid=1.",
        )
    if layout.more_than is not None and tensor is not None:
        tokens, size = tensor.shape[1 - tensor.batch_axis], layout.more_than
        warn(
            f"The {where} has {tokens} tokens, {tokens - math.prod(size)} more than the grid of "
            f"{' x '.join(map(str, size))} patches before it, and it is not known where they stand. All are "
            "read as a sequence. If they stand in front, call their parameters cls_token and register_tokens in the "
            "network; else match layers without positions, or pass grid=1.",
        )
    if layout.unordered is not None and tensor is not None:
        warn(
            f"The {where} has {tensor.shape[1 - tensor.batch_axis]} tokens of a grid of "
            f"{' x '.join(map(str, layout.unordered))} patches, but a change of one patch does not show that they lie "
            "row by row: they may be queries that look at the patches, or patches in the order of windows. They are "
            "read as a sequence. Match layers that give maps, or networks with the same order, or pass grid=1.",
        )
    if layout.frames is not None:
        count, size = layout.frames[0], layout.frames[1:]
        warn(
            f"The {where} has the patches of {count} frames, each of {' x '.join(map(str, size))}, and it is not known "
            "whether frames or patches come first. They are read as a sequence: match layers of networks with the same "
            "order, or pass grid=1.",
        )
    return NeuronReader(
        layer=where,
        neuron_axis=read.axis,
        batch_axis=0 if tensor is None else tensor.batch_axis,
        grid=grid,
        prefix_tokens=layout.prefix,
        token_grid=layout.size,
        select=None if read.name.endswith(INPUT) else read.select,
    )


def token_layout(read: TracedRead, masks: LayerMasks) -> TokenGrid:
    """How the tokens of a layer lie; none of it for layers of other shapes.

    Args:
        read: What is read.
        masks: Its padding masks.
    """
    tensor = read.tensor
    if masks.used is not None:  # a grid has no padding
        return TokenGrid(read.trace.prefix_tokens if masks.drops_prefix else 0)
    if tensor is not None and len(tensor.shape) == 3 and read.axis in (2, -1):
        return find_token_grid(read.trace, read.trace.layer(read.name), tensor)
    return TokenGrid()


def _patches(trace: Trace, modules: Mapping[str, nn.Module], layout: TokenGrid) -> PatchMap | None:
    """The layer that gives the map of the tokens."""
    if layout.size is None:
        return None
    output = trace.layer(layout.source).output
    neurons = None if output is None else output.neuron_axis
    axes = tuple(sorted(set(range(1, len(layout.size) + 2)) - {neurons}))
    return PatchMap(layout.source, modules[layout.source], axes, layout.merged)
