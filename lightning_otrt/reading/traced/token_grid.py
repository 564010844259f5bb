"""The grid of tokens that come from the patches of a map, as far as the traced forward shows it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from lightning_otrt.layers.automatic import is_of_heads
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor

__all__ = ["TokenGrid", "find_token_grid", "has_hidden_grid"]


#: More tokens than this beside the patches are another sequence, such as a text.
_FEW = 16


class _Map(NamedTuple):
    """The sizes of a map, the layer that it comes from, and the side of the squares that were merged.

    The sizes are rows and columns, with the times in front of a video.

    The axes of a convolution are known. Those of other layers follow from sizes, which may agree by chance.
    """

    size: tuple[int, ...]
    source: str
    is_conv: bool
    merged: int = 1


class TokenGrid(NamedTuple):
    """How the tokens of a layer lie.

    Attributes:
        prefix: Number of class and register tokens in front.
        size: Rows and columns of the others, of a video times, rows and columns; None for a sequence.
        source: Name of the layer that gives the map which they come from.
        merged: The side of the square of its positions that each token holds.
        part_of: The sizes of the patches before the layer, where it has fewer tokens than these.
        more_than: The same, where it has a few more, whose place is not known.
        frames: Number of frames of a video and the sizes of each, where its frames are images of their own with several
            patches: it is not known whether frames or patches come first.
        unordered: The sizes of the patches before the layer, where it has as many tokens, which are not shown to lie
            row by row.
    """

    prefix: int = 0
    size: tuple[int, ...] | None = None
    source: str = ""
    merged: int = 1
    part_of: tuple[int, ...] | None = None
    more_than: tuple[int, ...] | None = None
    frames: tuple[int, ...] | None = None
    unordered: tuple[int, ...] | None = None


def find_token_grid(trace: Trace, layer: TracedLayer, tensor: TracedTensor) -> TokenGrid:
    """How many tokens are a prefix, and the rows and columns of the others where they come from the cells of a map.

    The map is that of a patch embedding or of a convolution before the layer, or what is left of it where neighbouring
    tokens were merged, as in Swin transformers. Any other number of tokens is no grid, even if it is a square: masked
    autoencoders keep a random part of the patches.

    Args:
        trace: Trace of the network.
        layer: The layer.
        tensor: What it gives, or what enters it: ``(B, T, C)`` or ``(T, B, C)``.
    """
    tokens = tensor.shape[1 - tensor.batch_axis]
    before = [*_before(trace, layer), replace(layer, output=None)]
    maps = _maps(before, trace, _gets_images(trace, layer))
    if not maps:
        hidden = TokenGrid(_prefix_of_cut_patches(trace, layer, tensor))
        return hidden if hidden.prefix else _of_frames(trace, before, tokens)
    if _are_words(trace, before, tokens, maps[-1].source):
        return TokenGrid()
    if not _gets_images(trace, layer, channels=2) and _are_rows(before, tokens):
        return TokenGrid()
    is_unordered = _name_of(layer, tensor) in trace.unordered_tokens
    hold_words = _hold_words(trace, before, tokens, maps)
    # The declared prefix first, then none: some models add it after this layer.
    for prefix in dict.fromkeys((trace.prefix_tokens, 0)):
        fitting = [found for found in maps if math.prod(found.size) == tokens - prefix]
        if fitting:
            found = next((found for found in reversed(fitting) if found.is_conv), fitting[-1])
            if is_unordered:
                # Learned queries that look at the patches: they are as many by chance, and have no place in the image.
                are_queries = layer.looks_at_memory and tokens in trace.learned_tokens
                return TokenGrid() if are_queries or hold_words else TokenGrid(prefix, unordered=found.size)
            return TokenGrid(prefix, found.size, found.source, found.merged)
    if hold_words:
        return TokenGrid()
    prefix = trace.prefix_tokens if tokens > trace.prefix_tokens else 0
    for found in (found for found in reversed(maps) if found.is_conv and found.merged == 1):
        size = found.size
        more = tokens - math.prod(size)
        # One token is a class token under any name, or made by code. Of several, some may stand behind the patches.
        if more == 1 and tokens > 2 and not layer.looks_at_memory:
            return TokenGrid(unordered=size) if is_unordered else TokenGrid(1, size, found.source)
        # More than a few are another sequence, but for learned tokens that stand beside the patches.
        is_beside = 1 < more <= _FEW or not {more, more - prefix}.isdisjoint(trace.learned_tokens)
        if more > 1 and is_beside and math.prod(size) > 1 and not layer.looks_at_memory:
            return TokenGrid(prefix, more_than=size)
    last = maps[-1].size
    # Learned queries, latent vectors and the one token of class attention are no patches.
    is_learned = layer.looks_at_memory or tokens == 1 or not {tokens, tokens - prefix}.isdisjoint(trace.learned_tokens)
    return TokenGrid(prefix, part_of=last if math.prod(last) > tokens - prefix and not is_learned else None)


def has_hidden_grid(trace: Trace, layer: TracedLayer, tensor: TracedTensor) -> bool:
    """Whether tokens come from images of which no map shows the patches, as where code cuts them out."""
    if len(tensor.shape) != 3 or tensor.neuron_axis != 2 or layer.looks_at_memory:
        return False
    tokens = tensor.shape[1 - tensor.batch_axis]
    towers = _towers(trace, layer)
    shapes = (towers[-1] if towers else trace.layer(trace.root)).input_shapes
    # A mask of a sequence may have four axes, too.
    lengths = {tokens, *(shape[1] for shape in shapes if len(shape) in (2, 3))}
    images = [shape for shape in shapes if len(shape) == 4 and lengths.isdisjoint(shape[2:]) and 1 not in shape[2:]]
    return bool(images) and tokens > 4 and not _maps(_before(trace, layer), trace, True)


def _prefix_of_cut_patches(trace: Trace, layer: TracedLayer, tensor: TracedTensor) -> int:
    """How many class and register tokens stand before patches that code cut out: those declared, if these ran alone."""
    alone = tensor.shape[1 - tensor.batch_axis] - trace.prefix_tokens
    if not trace.prefix_tokens or alone < 1 or not has_hidden_grid(trace, layer, tensor):
        return 0
    outputs = (other.output for other in _before(trace, layer))
    sequences = (it for it in outputs if it is not None and len(it.shape) == 3 and it.neuron_axis == 2)
    return trace.prefix_tokens if any(it.shape[1 - it.batch_axis] == alone for it in sequences) else 0


def _name_of(layer: TracedLayer, tensor: TracedTensor) -> str:
    """How a tensor of a layer is called: what enters it, or what it gives."""
    return layer.name + INPUT if tensor is layer.input else layer.name


def _of_frames(trace: Trace, before: list[TracedLayer], tokens: int) -> TokenGrid:
    """Tokens that come from the patches of several frames of each sample, which a convolution took as images."""
    for layer in reversed(before):
        tensor = layer.output
        if layer.role != "conv" or tensor is None or len(tensor.shape) != 4 or not trace.batch_size:
            continue
        count, rest = divmod(tensor.shape[0], trace.batch_size)
        for prefix in dict.fromkeys((trace.prefix_tokens, 0)):
            patches = tensor.position_count
            if not rest and count > 1 and count * patches == tokens - prefix:
                # With one patch in each frame both orders are the same.
                return TokenGrid(prefix, frames=(count, *tensor.positions) if patches > 1 else None)
    return TokenGrid()


def _are_words(trace: Trace, before: list[TracedLayer], tokens: int, source: str) -> bool:
    """Whether as many tokens were made of ids after the map, as those of a caption: they are none of its patches."""
    order = trace.layer(source).order or 0
    return tokens in _id_counts(trace, [layer for layer in before if (layer.order or 0) > order])


def _hold_words(trace: Trace, before: list[TracedLayer], tokens: int, maps: list[_Map]) -> bool:
    """Whether the patches of a map and as many words as there are ids are together as many tokens.

    A captioner has its image in front of the text. A class token, or those that are declared, may stand there, too.
    """
    others = (tokens - count for count in _id_counts(trace, before))
    extra = {0, 1, trace.prefix_tokens}
    return any(other - math.prod(found.size) in extra for other in others for found in maps)


def _id_counts(trace: Trace, layers: list[TracedLayer]) -> set[int]:
    """How many ids of each sample enter a layer, such as the words for an embedding."""
    entered = (layer.input for layer in layers if layer.input is not None and not layer.input.is_floating)
    return {ids.shape[1] for ids in entered if len(ids.shape) == 2 and trace.is_sample_count(ids.shape[0])}


def _are_rows(before: list[TracedLayer], tokens: int) -> bool:
    """Whether a token is a row, or a column, of a map with all its channels: a frame behind convolutions of a sound.

    The squares of a map with as many rows as columns may have the same sizes; these are taken for squares, as are those
    of images of several channels.
    """
    widths: set[int] = set()
    for layer in before:
        if layer.input is not None and len(layer.input.shape) == 3:
            shape = layer.input.shape
            if shape[1 - layer.input.batch_axis] == tokens and shape[2] in widths:
                return True
        tensor = layer.output
        if tensor is not None and tensor.neuron_axis == 1 and len(tensor.shape) == 4:
            rows, columns = tensor.positions
            if rows != columns and tokens in (rows, columns):
                widths.add(tensor.shape[1] * (columns if tokens == rows else rows))
    return False


def _before(trace: Trace, layer: TracedLayer) -> list[TracedLayer]:
    """The layers that ran before this one and may lead to it, in order.

    Layers of another tower are left out: inside a module that takes an input of the whole model (a text encoder), what
    ran before that module (an image encoder) does not lead to it.
    """
    inside = [f"{tower.name}." for tower in _towers(trace, layer)]
    ran = [
        other
        for other in trace.layers
        if other.order is not None
        and other.order < (layer.order or 0)
        and all(other.name.startswith(prefix) for prefix in inside)
    ]
    return sorted(ran, key=lambda other: other.order or 0)


def _towers(trace: Trace, layer: TracedLayer) -> list[TracedLayer]:
    """The modules around a layer that take an input of the whole model, the outermost first."""
    parts = layer.name.split(".")
    around = [trace.layer(".".join(parts[:end])) for end in range(1, len(parts))]
    return [module for module in around if module.takes_model_input and module.name != trace.root]


def _gets_images(trace: Trace, layer: TracedLayer, channels: int = 1) -> bool:
    """Whether a tensor of four or more axes, with so many channels, enters the innermost tower around a layer."""
    towers = _towers(trace, layer)
    around = towers[-1] if towers else trace.layer(trace.root)
    return any(len(shape) > 3 and shape[1] >= channels for shape in around.input_shapes)


def _maps(layers: list[TracedLayer], trace: Trace, gets_images: bool) -> list[_Map]:
    """The maps that the layers give, and those of merged tokens that enter them, in order.

    If a network gets tokens and no images, a map counts only if it has as many positions as there are tokens: some
    networks run convolutions over (heads, tokens, width) or over attention.
    """
    found: list[_Map] = []
    #: The numbers of channels that were seen with each number of positions.
    channels: dict[int, set[int]] = {}
    had_tokens = False
    for layer in layers:
        if layer.input is not None and (merged := _merged(layer.input, found, channels)) is not None:
            found.append(merged)
        tensor = layer.output
        if tensor is None:
            continue
        is_conv = layer.role in ("conv", "pointwise")
        is_map = len(tensor.shape) == 4 or (len(tensor.shape) == 5 and is_conv)
        is_map = is_map and trace.is_sample_count(tensor.shape[0]) and not is_of_heads(layer, trace)
        if is_map and tensor.neuron_axis is not None:
            cells = tensor.position_count
            if not (gets_images or found) and had_tokens and cells not in channels:
                continue
            # Keys of an attention with one head of keys, (B, 1, T, D), are normalised; they are no map of one row.
            is_row = 1 in tensor.positions and cells > 1
            if is_row and not is_conv and all(tensor.positions != earlier.size for earlier in found):
                continue
            found.append(_Map(tensor.positions, layer.name, is_conv))
            channels.setdefault(cells, set()).add(tensor.shape[tensor.neuron_axis])
        elif len(tensor.shape) == 3:
            channels.setdefault(tensor.shape[1 - tensor.batch_axis], set()).add(tensor.shape[2])
            had_tokens |= tensor.neuron_axis == 2 and tensor.shape[tensor.batch_axis] == trace.batch_size
    return found


def _merged(tensor: TracedTensor, maps: list[_Map], channels: dict[int, set[int]]) -> _Map | None:
    """The map of tokens that each hold the channels of a square of ``side`` x ``side`` earlier ones."""
    if len(tensor.shape) != 3:
        return None
    tokens, width = tensor.shape[1 - tensor.batch_axis], tensor.shape[2]
    for size, source, is_conv, merged in reversed(maps):
        if len(size) != 2:
            continue
        rows, columns = size
        side = math.isqrt(rows * columns // tokens) if tokens else 0
        divides = side > 1 and rows % side == columns % side == 0 and rows * columns == tokens * side**2
        if divides and width in {side**2 * before for before in channels.get(rows * columns, ())}:
            return _Map((rows // side, columns // side), source, is_conv, merged * side)
    return None
