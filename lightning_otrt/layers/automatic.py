"""The rules behind the words of ``layers=``: which layers "blocks" and "penultimate" are in a traced model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace, TracedLayer

__all__ = ["adds_nothing", "block_names", "classification_head", "evenly_spaced", "penultimate_names"]

#: Number of transformer blocks that "blocks" chooses.
_BLOCKS = 4


def penultimate_names(trace: Trace) -> list[str]:
    """What enters the classification head, as a list of one name; empty where no head is found."""
    head = classification_head(trace)
    if head is None:
        return []
    before = trace.layer(head.input_from) if head.input_from is not None else None
    if before and before.role == "dropout" and before.calls == 1 and before.input and before.input.neuron_axis:
        # After the dropout the student has noise in training, and the teacher has none.
        return [before.name + INPUT]
    return [head.name + INPUT]


def classification_head(trace: Trace) -> TracedLayer | None:
    """The last linear map that ran, if only pooling or an activation stands between it and a 2-D output."""
    widths = {shape[1] for shape in trace.output_shapes if len(shape) == 2}
    ran = [layer for layer in trace.layers if layer.order is not None and layer.name != trace.root]
    for layer in sorted(ran, key=lambda layer: layer.order or 0, reverse=True):
        output = layer.output
        if layer.role in ("linear", "pointwise") and output is not None and output.neuron_axis is not None:
            return layer if output.shape[output.neuron_axis] in widths else None
        if not layer.is_container and layer.role not in ("pool", "dropout", "passive"):
            return None
    return None


def block_names(trace: Trace) -> list[str]:
    """The last layer at each spatial resolution, or evenly spaced transformer blocks; empty where there are none."""
    layers = _block_candidates(trace)
    maps = _last_at_each_size([layer for layer in layers if not _is_tokens(layer) and not adds_nothing(layer)], trace)
    tokens = _token_blocks(layers)
    # Patch embeddings and convolutional stems give maps too, but before the tokens; a feature pyramid ends with a map.
    if not tokens or (maps and (maps[-1].order or 0) > (tokens[-1].order or 0)):
        return [layer.name for layer in maps]
    if len({_size(layer) for layer in tokens}) > 1:
        return [layer.name for layer in _last_at_each_size(tokens, trace)]
    count = min(_BLOCKS, len(tokens))
    return [tokens[(part + 1) * len(tokens) // count - 1].name for part in range(count)]


def evenly_spaced(wanted: int, names: Sequence[str]) -> list[str]:
    """So many of the names, evenly spaced from the first to the last; names repeat where there are fewer.

    Example:
        >>> evenly_spaced(3, ["a", "b", "c", "d", "e"])
        ['a', 'c', 'e']
    """
    if wanted == 1:
        return [names[-1]]
    return [names[round(i * (len(names) - 1) / (wanted - 1))] for i in range(wanted)]


def adds_nothing(layer: TracedLayer) -> bool:
    """Whether a layer gives nothing that its input lacks: dropout, a placeholder, or pooling that does not shrink.

    The 7x7 pooling of VGG repeats the positions of small images.
    """
    if layer.role == "pool" and layer.input is not None and layer.output is not None:
        return math.prod(layer.output.positions) >= math.prod(layer.input.shape[2:])
    return layer.role == "dropout" or layer.kind == "Identity"


def _block_candidates(trace: Trace) -> list[TracedLayer]:
    """Recordable layers before the head, without the model's own output, in order of completion."""
    head = classification_head(trace)
    leaves = [layer.name for layer in trace.layers if layer.calls and not layer.is_container]
    dense_heads = [
        layer.output_shape
        for layer in trace.layers
        if layer.gives_model_output and layer.role in ("linear", "pointwise", "conv")
    ]
    found = []
    for layer in trace.recordable():
        tensor = layer.output
        if tensor is None or tensor.neuron_axis is None or len(tensor.shape) < 3:
            continue
        after_head = head is not None and (layer.order or 0) >= (head.order or 0)
        holds_all = layer.is_container and all(name.startswith(f"{layer.name}.") for name in leaves)
        is_output = layer.gives_model_output and (holds_all or tensor.shape in dense_heads)
        # Inside attention, windows and unfolded patches count as samples; such layers are no blocks of the network.
        if not after_head and not is_output and tensor.shape[tensor.batch_axis] == trace.batch_size:
            found.append(layer)
    return found


def _last_at_each_size(layers: list[TracedLayer], trace: Trace) -> list[TracedLayer]:
    """The last layer with each number of positions, without what a later block computes before its own stride."""
    known = {layer.name: layer for layer in trace.layers}
    sizes = {layer.name: _size(layer) for layer in layers}
    last: dict[int, tuple[int, TracedLayer]] = {}
    for layer in layers:
        size = _size(layer)
        depth = sum(_is_before_stride(known[name], layer, known, sizes) for name in _ancestors(layer.name))
        if size > 1 and (size not in last or depth <= last[size][0]):
            last[size] = (depth, layer)
    return sorted((layer for _, layer in last.values()), key=lambda layer: layer.order or 0)


def _is_before_stride(
    block: TracedLayer, inner: TracedLayer, known: dict[str, TracedLayer], sizes: dict[str, int]
) -> bool:
    """Whether ``inner`` has the size that enters ``block``, which gives another size: it comes before the stride.

    A module that holds more than two sizes is a network rather than a block, and so is a Sequential of blocks.
    """
    if block.input is None or block.output is None or block.input.neuron_axis is None:
        return False
    size = math.prod(block.input.positions)
    if size != _size(inner) or size == _size(block):
        return False
    prefix = f"{block.name}."
    if len({n for name, n in sizes.items() if name.startswith(prefix) and n > 1}) > 2:
        return False
    child = prefix + inner.name.removeprefix(prefix).split(".")[0]
    return block.kind != "Sequential" or not known[child].is_container


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _size(layer: TracedLayer) -> int:
    return math.prod(layer.output.positions) if layer.output else 0


def _is_tokens(layer: TracedLayer) -> bool:
    return layer.output is not None and len(layer.output.shape) == 3 and layer.neuron_axis == 2


def _token_blocks(layers: list[TracedLayer]) -> list[TracedLayer]:
    """The outermost repeated blocks that give tokens: containers of one type whose names differ in a number only."""
    groups: dict[tuple[str, str], list[TracedLayer]] = {}
    for layer in layers:
        if layer.is_container and _is_tokens(layer):
            groups.setdefault((re.sub(r"\d+", "#", layer.name), layer.kind), []).append(layer)
    repeated = [group for group in groups.values() if len(group) > 1]
    holders = tuple(f"{layer.name}." for group in repeated for layer in group)
    return max((group for group in repeated if not group[0].name.startswith(holders)), key=len, default=[])
