"""The rule behind "blocks" in ``layers=``: which layers of a traced model are blocks."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import takewhile

from lightning_otrt.layers.head import classification_head
from lightning_otrt.layers.model_output import output_layers
from lightning_otrt.layers.names import ancestors, is_inside
from lightning_otrt.layers.trace import LINEAR, Trace, TracedLayer

__all__ = [
    "adds_nothing",
    "block_candidates",
    "block_groups",
    "block_names",
    "evenly_spaced",
    "is_of_heads",
    "linear_maps",
    "unclear_stacks",
]

#: Number of transformer blocks that "blocks" chooses.
_BLOCKS = 4
#: Types of numbered modules that are no blocks: class attention (CaiT, XCiT, VOLO), embeddings of patches or places.
_NO_BLOCK = re.compile(r"Class(Attn|Attention|Block)\w*$|(Embed(s|der|ding|dings)?|Pos(Conv|Enc)|Position)$")


def block_names(trace: Trace) -> list[str]:
    """The names of all :func:`block_groups`, in order of completion."""
    names = [name for group in block_groups(trace) for name in group]
    return sorted(names, key=lambda name: trace.layer(name).order or 0)


def block_groups(trace: Trace) -> list[list[str]]:
    """The blocks of a model, one list for each of its parts, such as an encoder and a decoder.

    A network of maps has one part: the last layer at each spatial resolution, and where most of its blocks share one
    resolution (isotropic and dilated networks) some of these, evenly spaced. Each stack of transformer blocks is a part
    with evenly spaced blocks; where their number of tokens shrinks, the last block of each size. A network that sees
    and reads has both, the part of maps first. Without any of these each recurrent module is a block. Empty where there
    is none.
    """
    layers = block_candidates(trace)
    maps = _last_at_each_size([layer for layer in layers if not _is_tokens(layer) and not adds_nothing(layer)], trace)
    stacks = _token_stacks(layers, trace)
    last_token = max((stack[-1].order or 0 for stack in stacks), default=-1)
    # Patch embeddings and convolutional stems give maps too, but before the tokens; a feature pyramid ends with a map.
    seen = _convolutional_tower(maps, trace, last_token) if stacks else []
    if maps and not seen and (not stacks or _ends_with_pyramid(maps, stacks[-1][-1])):
        return [_names(_with_isotropic_blocks(maps, layers))]
    if not stacks:
        recurrent = [layer for layer in layers if layer.role == "recurrent"]
        return [evenly_spaced(min(_BLOCKS, len(recurrent)), _names(recurrent))] if recurrent else []
    share = max(_BLOCKS // len(stacks), 2) if len(stacks) > 1 else _BLOCKS
    groups = [_names(seen)] if seen else []
    for stack in stacks:
        if _shrinks(stack, trace):
            groups.append(_names(_last_at_each_size(stack, trace)))
        else:
            groups.append(evenly_spaced(min(share, len(stack)), _names(stack)))
    return groups


def _token_stacks(layers: list[TracedLayer], trace: Trace) -> list[list[TracedLayer]]:
    """The stacks of transformer blocks.

    Neither class attention nor embeddings are blocks: the first change the class token alone, the second come before
    the blocks of a stage.
    """
    numbered = (layer for layer in trace.layers if layer.name[-1:].isdigit())
    no_blocks = {layer.name for layer in numbered if _NO_BLOCK.search(layer.kind)}
    tokens = [layer for layer in layers if _is_tokens(layer)]
    return _repeated_blocks([each for each in tokens if no_blocks.isdisjoint((each.name, *ancestors(each.name)))])


def _ends_with_pyramid(maps: Sequence[TracedLayer], last: TracedLayer) -> bool:
    """Whether a feature pyramid comes after the last transformer block.

    Convolutions over its tokens (B, C, T), as adapters and heads for sound have, are none unless they grow in steps.
    """
    late = [layer for layer in maps if (layer.order or 0) > (last.order or 0)]
    larger = {_size(layer) for layer in late if _size(layer) > _size(last)}
    return any(len(layer.output_shape or ()) > 3 for layer in late) or len(larger) > 1


def _shrinks(stack: Sequence[TracedLayer], trace: Trace) -> bool:
    """Whether the number of tokens changes over a stack. A class token that enters late does not count."""
    sizes = {_size(layer) for layer in stack}
    return len(sizes) > 1 and max(sizes) - min(sizes) != trace.prefix_tokens


def evenly_spaced(wanted: int, names: Sequence[str]) -> list[str]:
    """Cut the names into ``wanted`` equal parts, and give the last name of each. Too few names are repeated.

    Example:
        >>> evenly_spaced(2, ["a", "b", "c", "d", "e", "f"])
        ['c', 'f']
        >>> evenly_spaced(3, ["a", "b"])
        ['a', 'b', 'b']
    """
    count = len(names)
    if wanted > count:
        return [names[math.ceil((part + 1) * count / wanted) - 1] for part in range(wanted)]
    return [names[(part + 1) * count // wanted - 1] for part in range(wanted)]


def adds_nothing(layer: TracedLayer) -> bool:
    """Whether a layer adds no information: dropout, an identity, pooling that does not shrink, or a norm of the inputs.

    The 7x7 pooling of VGG repeats the positions of small images.
    """
    if layer.takes_model_input and not layer.role and not layer.is_container and layer.input and layer.output:
        return layer.input.shape == layer.output.shape
    if layer.role == "pool" and layer.input is not None and layer.output is not None:
        return layer.output.position_count >= math.prod(layer.input.shape[2:])
    return layer.role == "dropout" or layer.kind == "Identity"


def block_candidates(trace: Trace) -> list[TracedLayer]:
    """Recordable layers before the head, without the model's own output, in order of completion.

    Inside attention, windows and unfolded patches count as samples; such layers are no blocks of the network. Where all
    of it works on rows of several parts of each sample, such as the channels of a series, these are taken.
    """
    head = classification_head(trace)
    outputs = output_layers(trace)
    leaves = [layer.name for layer in trace.layers if layer.calls and not layer.is_container]
    known = {layer.name: layer for layer in trace.layers}
    branches = _branches(trace.layers)
    found, of_rows = [], []
    for layer in trace.recordable():
        tensor = layer.output
        if tensor is None or tensor.neuron_axis is None or len(tensor.shape) < 3 or layer.name in outputs:
            continue
        if not branches.isdisjoint((layer.name, *ancestors(layer.name))):
            continue
        if tensor.shape[tensor.neuron_axis] == 1:
            continue  # one neuron is no representation: gates of spatial attention
        if not any(known[name].has_weights for name in (layer.name, *layer.reached_by)):
            continue  # made from the inputs without weights, as by pooling: nothing that was learned
        if is_of_heads(layer, trace):
            continue
        after_head = head is not None and (layer.order or 0) >= (head.order or 0)
        holds_all = layer.is_container and all(name.startswith(f"{layer.name}.") for name in leaves)
        if after_head or (holds_all and layer.gives_model_output) or _is_turned(layer, known):
            continue
        rows = tensor.shape[tensor.batch_axis]
        if trace.is_sample_count(rows):
            found.append(layer)
        elif trace.batch_size and rows % trace.batch_size == 0:
            of_rows.append(layer)
    return found or of_rows


def unclear_stacks(trace: Trace) -> list[list[TracedLayer]]:
    """The stacks of blocks that are left out because their neuron axis is not known, where others are found.

    What lies inside of a numbered module whose axis is known, such as its gate, is no block.
    """
    chosen = block_names(trace)
    known = {layer.name for layer in trace.recordable() if layer.neuron_axis is not None and layer.name[-1:].isdigit()}
    unknown = [
        layer
        for layer in trace.recordable()
        if layer.neuron_axis is None and len(layer.output_shape or ()) > 2 and known.isdisjoint(ancestors(layer.name))
    ]
    return [
        stack
        for stack in (_repeated_blocks(unknown) if chosen else [])
        if not any(is_inside(name, layer.name) or is_inside(layer.name, name) for name in chosen for layer in stack)
    ]


def _branches(layers: Sequence[TracedLayer]) -> set[str]:
    """Numbered layers of one type that all get the same tensor, as in a spatial pyramid. They are no blocks.

    Those that have blocks of their own, such as two encoders of one embedding, are networks and no branches.
    """
    networks = {name for name in _alike(layers, set()) if _has_blocks(name, layers)}
    return _alike(layers, networks) - networks


def _alike(layers: Sequence[TracedLayer], networks: AbstractSet[str]) -> set[str]:
    """Numbered layers of one type, in one of these networks or outside of them, that all get the same tensor."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for layer in layers:
        if layer.reached_by and layer.calls:
            inside = next((name for name in ancestors(layer.name) if name in networks), "")
            groups.setdefault((_pattern(layer), layer.kind, layer.reached_by, inside), []).append(layer.name)
    return {name for group in groups.values() if len(group) > 1 for name in group}


def _has_blocks(name: str, layers: Sequence[TracedLayer]) -> bool:
    """Whether a layer holds three blocks or more: numbered parts of several linear maps, or of more than two sizes.

    A branch may well have a few convolutions, each with its normalisation.
    """
    inside = [layer for layer in layers if layer.name.startswith(f"{name}.") and layer.calls]
    groups: dict[tuple[str, str], list[TracedLayer]] = {}
    for layer in inside:
        if layer.is_container and layer.has_weights:
            groups.setdefault((_pattern(layer), layer.kind), []).append(layer)
    return any(
        len(group) > 2 and (len({*map(_size, group)}) > 2 or all(linear_maps(block, inside) > 1 for block in group))
        for group in groups.values()
    )


def linear_maps(block: TracedLayer, layers: Sequence[TracedLayer]) -> int:
    """How many of these layers are linear maps or convolutions inside of a block."""
    return sum(layer.role in LINEAR and layer.name.startswith(f"{block.name}.") for layer in layers)


def _pattern(layer: TracedLayer) -> str:
    return re.sub(r"\d+", "#", layer.name)


def _is_turned(layer: TracedLayer, known: dict[str, TracedLayer]) -> bool:
    """Whether a layer mixes positions of a module around it, so that its neurons are, or may be, positions there.

    So does a layer inside of a module that does.
    """
    around = [known[name] for name in ancestors(layer.name) if name in known]
    return any(_is_other_way(inner, around) for inner in (layer, *around))


def is_of_heads(layer: TracedLayer, trace: Trace) -> bool:
    """Whether a layer gives the heads of an attention, (B, heads, T, D) or (B, T, heads, D), among tokens (B, T, C).

    That is no map of heads x T positions, and a mask of the tokens would not be read with it.
    """
    shape = layer.output_shape or ()
    if len(shape) != 4 or layer.neuron_axis != 3:
        return False
    around = [outer for outer in trace.around(layer.name) if _is_tokens(outer)]
    # An attention that pools its queries gives fewer tokens than it gets, and has keys for all of these.
    tokens = [side for outer in around for side in (outer.output, outer.input) if side and len(side.shape) == 3]
    return any(
        outer.shape[1 - outer.batch_axis] in shape[1:3]
        # Tokens (B, T, C) that are shown as a map of one row, (B, T, 1, C), are no heads.
        and (math.prod(shape[1:3]) != outer.shape[1 - outer.batch_axis] or shape[3] != outer.shape[2])
        for outer in tokens
    )


def _is_other_way(layer: TracedLayer, around: Sequence[TracedLayer]) -> bool:
    """Whether a layer gives the axes of a module around it in another order, or with other ones as neurons."""
    shape = layer.output_shape or ()
    for outer in around:
        if outer is layer or not layer.name.startswith(f"{outer.name}." if outer.name else ""):
            continue
        if outer.output_shape == shape and outer.neuron_axis != layer.neuron_axis:
            return True
        has_same_sizes = len(shape) > 3 and sorted(outer.output_shape or ()) == sorted(shape)
        if has_same_sizes and outer.neuron_axis is not None and _size(outer) != _size(layer):
            return True
    return False


def _with_isotropic_blocks(maps: list[TracedLayer], layers: list[TracedLayer]) -> list[TracedLayer]:
    """The maps, with more blocks of the one resolution at which a network has most of its blocks."""
    stacks = _repeated_blocks([layer for layer in layers if not _is_tokens(layer) and not adds_nothing(layer)])
    blocks = [layer for stack in stacks for layer in stack]
    sizes = Counter(_size(layer) for layer in blocks)
    size, count = sizes.most_common(1)[0] if sizes else (0, 0)
    if len(maps) >= _BLOCKS or count < 3 or 2 * count <= len(blocks):
        return maps
    others = [layer for layer in maps if _size(layer) != size]
    same = [layer for layer in blocks if _size(layer) == size]
    chosen = evenly_spaced(min(_BLOCKS - len(others), len(same)), _names(same))
    known = {layer.name: layer for layer in same}
    return sorted([*others, *(known[name] for name in chosen)], key=lambda layer: layer.order or 0)


def _convolutional_tower(maps: list[TracedLayer], trace: Trace, last_token: int) -> list[TracedLayer]:
    """The maps of images, in a network that also gets the ids of words, or a series; else none.

    One map before the tokens may be that of their patches.
    """
    leaves = [layer for layer in trace.layers if layer.takes_model_input and not layer.is_container]
    entered = [layer.input for layer in leaves if layer.input is not None]
    sees = any(len(tensor.shape) == 4 and tensor.is_floating for tensor in entered)
    reads = any(len(tensor.shape) == (3 if tensor.is_floating else 2) for tensor in entered)
    images = [layer for layer in maps if len(layer.output_shape or ()) == 4]
    is_tower = len(images) > 1 or any((layer.order or 0) > last_token for layer in images)
    return images if sees and reads and is_tower else []


def _names(layers: Sequence[TracedLayer]) -> list[str]:
    return [layer.name for layer in layers]


def _last_at_each_size(layers: list[TracedLayer], trace: Trace) -> list[TracedLayer]:
    """The last layer with each number of positions, without what a later block computes before its own stride."""
    known = {layer.name: layer for layer in trace.layers}
    sizes = {layer.name: _size(layer) for layer in layers}
    last: dict[int, tuple[int, TracedLayer]] = {}
    for layer in layers:
        size = _size(layer)
        around = [known[name] for name in ancestors(layer.name) if name in known]  # not a name of an alias
        depth = sum(_is_before_stride(block, layer, known, sizes) for block in around)
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
    size = block.input.position_count
    if size != _size(inner) or size == _size(block):
        return False
    prefix = f"{block.name}."
    if len({n for name, n in sizes.items() if name.startswith(prefix) and n > 1}) > 2:
        return False
    child = prefix + inner.name.removeprefix(prefix).split(".")[0]
    return block.kind != "Sequential" or not known[child].is_container


def _size(layer: TracedLayer) -> int:
    return layer.output.position_count if layer.output else 0


def _is_tokens(layer: TracedLayer) -> bool:
    return layer.output is not None and len(layer.output.shape) == 3 and layer.neuron_axis == 2


def _repeated_blocks(layers: list[TracedLayer]) -> list[list[TracedLayer]]:
    """The outermost stacks of blocks: containers of one type whose names differ in a number only, in order."""
    groups: dict[tuple[str, str], list[TracedLayer]] = {}
    for layer in layers:
        if layer.is_container:
            groups.setdefault((_pattern(layer), layer.kind), []).append(layer)
    repeated = [group for group in groups.values() if len(group) > 1]
    holders = tuple(f"{layer.name}." for group in repeated for layer in group)
    outermost = [group for group in repeated if not group[0].name.startswith(holders)]
    # Groups that begin with the same name (blocks and their downsampling) are one stack: the largest group stands for
    # it. A number that all of them share, as in `t5.encoder` and `t5.decoder`, counts nothing.
    shared = _shared_start([layer.name for group in outermost for layer in group])
    stacks: dict[str, list[TracedLayer]] = {}
    for group in sorted(outermost, key=len):
        stacks[re.split(r"\d+", group[0].name.removeprefix(shared))[0]] = group
    return sorted(stacks.values(), key=lambda group: group[-1].order or 0)


def _shared_start(names: Sequence[str]) -> str:
    """The modules that all names begin with."""
    components = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, components))
