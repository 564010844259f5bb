"""From a specification of layers and two traces to pairs: the automatic choices, and what can be recorded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_otrt.layers.grammar import WORDS, LayerEntry, LayerNames, pair_up, parse_layers, reject_duplicates
from lightning_otrt.layers.pairs import INPUT, LayerPair, LayerSpec, Trace, TracedLayer, TracedTensor

__all__ = ["classification_head", "is_idle", "resolve_layers", "select_layers"]

_BLOCKS = 4

#: Pairs (student layer, teacher layer) that only activations can tell.
Matched = Callable[[], Sequence[tuple[str, str]]]


def resolve_layers(
    spec: LayerSpec, student: Trace, teacher: Trace, matched: Matched | None = None
) -> tuple[LayerPair, ...]:
    """The pairs of layers that a specification stands for in two traced models.

    ``spec`` is a mapping ``{student name: teacher name}``, a list of pairs, a list of names that both models have, or
    one name. A name may be a glob (``"layer?"``, level by level), a regex (``"re:layer[34]"``, which matches the whole
    name), an index among the recordable layers (-1 completes last), ``"name:input"`` for what enters a layer, or a
    word: ``"penultimate"`` is what enters the classification head, ``"blocks"`` the last module at each spatial
    resolution or four evenly spaced transformer blocks, ``"auto"`` blocks where both models have them and penultimate
    otherwise, ``"matched"`` the blocks of the student with those layers of the teacher that are closest to them on one
    batch, in order. A list mixes all of these. A student layer may be matched to two teacher layers. A module that is
    itself called ``blocks`` is reached as ``"re:blocks"``.

    Args:
        spec: What the user gave as ``layers``. In a list, a list or tuple of two is a pair; a mapping with the keys
            ``student`` and ``teacher`` holds the fields of one :class:`LayerPair`.
        student: Trace of the student; names are looked up in the whole model first, then relative to its root.
        teacher: Trace of the teacher; the same.
        matched: Finds the pairs of ``"matched"``, which a trace does not tell; not called without that word.

    Returns:
        Pairs with full names, weights that sum to 1, and the non-negative neuron axes ``(student, teacher)``.

    Raises:
        TypeError: If an element of ``spec`` is none of the accepted forms.
        ValueError: If a name is unknown, a layer gives no representation, two patterns find different numbers of
            layers, or a pair is named twice.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_otrt.reading.tracer import trace
        >>> net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        >>> seen = trace(net, (torch.randn(4, 6),))
        >>> [(pair.student, pair.teacher) for pair in resolve_layers([-2, "penultimate"], seen, seen)]
        [('1', '1'), ('2:input', '2:input')]
    """
    pairs = []
    for entry in parse_layers(spec):
        pairs += _expand(entry, student, teacher, matched)
    reject_duplicates(pairs)
    total = math.fsum(pair.weight for pair in pairs)
    return tuple(_completed(pair, student, teacher, total) for pair in pairs)


def select_layers(selectors: Sequence[str | int], trace: Trace, side: str) -> dict[str, int]:
    """The layers of one model that names, patterns, indices, "blocks" or "penultimate" stand for, with neuron axes.

    Raises:
        ValueError: If a name is unknown, or a layer gives no representation.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_otrt.reading.tracer import trace
        >>> seen = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (torch.randn(2, 3, 8, 8),))
        >>> select_layers([-1, "0"], seen, "student")
        {'1': 1, '0': 1}
    """
    names, nobody = _names(side, trace), LayerNames("", ())
    found = [name for selector in selectors for name in _choose(selector, trace, names, nobody)]
    return {name: _axis(side, trace, name, None, _recordable(side, trace, name, None)) for name in found}


def _expand(entry: LayerEntry, student: Trace, teacher: Trace, matched: Matched | None) -> list[LayerPair]:
    if entry.student == "matched" and _blocks(student) and _blocks(teacher):
        if matched is None:
            raise ValueError('"matched" pairs layers by their activations, and traces alone have none.')
        return [entry.pair(*names) for names in matched()]
    if entry.student in ("auto", "matched"):
        word = "blocks" if _blocks(student) and _blocks(teacher) else "penultimate"
        entry = replace(entry, student=word, teacher=word)
    names = [_names("student", student), _names("teacher", teacher)]
    chosen_student = _choose(entry.student, student, names[0], names[1])
    chosen_teacher = _choose(entry.teacher, teacher, names[1], names[0])
    if entry.student == entry.teacher == "blocks":
        chosen_teacher = _by_depth(len(chosen_student), chosen_teacher)
    return pair_up(entry, chosen_student, chosen_teacher)


def _names(side: str, trace: Trace) -> LayerNames:
    return LayerNames(side, trace.names(), trace.root, kind=trace.layer(trace.root).kind)


def _choose(name: str | int, trace: Trace, names: LayerNames, other: LayerNames) -> list[str]:
    if isinstance(name, int):
        return [_by_index(name, trace, names.side)]
    if name in WORDS:
        choose: Callable[[Trace], list[str]] = _blocks if name == "blocks" else _penultimate
        found = choose(trace)
        if not found:
            raise ValueError(_NOTHING_FOUND[name].format(side=names.side, kind=names.kind))
        return found
    # A module under two names is one layer: pairs carry the first name, so that duplicates are seen.
    return [
        trace.layer(found).name + (INPUT if found.endswith(INPUT) else "") for found in names.find(str(name), other)
    ]


_NOTHING_FOUND = {
    "blocks": "No layer of the {side} ({kind}) has positions or tokens with a known neuron axis, so there are no "
    'blocks to match. Use "penultimate", or name the layers and their `neuron_axis`.',
    "penultimate": "No classification head was found in the {side} ({kind}): its forward does not end with a Linear or "
    "1x1 convolution that gives a 2-D output. Name the layer, such as 'fc:input' or 'backbone'.",
}


def _by_index(index: int, trace: Trace, side: str) -> str:
    recordable = trace.recordable()
    count = len(recordable)
    if not -count <= index < count:
        raise ValueError(
            f"Index {index} is out of range in the {side}: it has {count} recordable layers, so an index lies in "
            f"[{-count}, {count - 1}]. Negative indices count from the layer that completes last."
        )
    return recordable[index].name


def _by_depth(wanted: int, names: list[str]) -> list[str]:
    if wanted == len(names):
        return names
    if wanted == 1:
        return [names[-1]]
    return [names[round(i * (len(names) - 1) / (wanted - 1))] for i in range(wanted)]


def classification_head(trace: Trace) -> TracedLayer | None:
    """The last linear map executed, where nothing but pooling or an activation stands between it and a 2-D output."""
    widths = {shape[1] for shape in trace.output_shapes if len(shape) == 2}
    ran = [layer for layer in trace.layers if layer.order is not None and layer.name != trace.root]
    for layer in sorted(ran, key=lambda layer: layer.order or 0, reverse=True):
        output = layer.output
        if layer.role in ("linear", "pointwise") and output is not None and output.neuron_axis is not None:
            return layer if output.shape[output.neuron_axis] in widths else None
        if not layer.is_container and layer.role not in ("pool", "dropout", "passive"):
            return None
    return None


def _penultimate(trace: Trace) -> list[str]:
    head = classification_head(trace)
    if head is None:
        return []
    before = trace.layer(head.producer) if head.producer is not None else None
    if before and before.role == "dropout" and before.calls == 1 and before.input and before.input.neuron_axis:
        # What leaves the dropout carries the student's noise in training, and the teacher has none.
        return [before.name + INPUT]
    return [head.name + INPUT]


def _blocks(trace: Trace) -> list[str]:
    layers = _block_candidates(trace)
    last_maps = _last_at_each_size([layer for layer in layers if not _is_tokens(layer) and not is_idle(layer)], trace)
    tokens = _token_blocks(layers)
    # Patch embeddings and convolutional stems give maps too, before the tokens; a pyramid ends with a map.
    if not tokens or (last_maps and (last_maps[-1].order or 0) > (tokens[-1].order or 0)):
        return [layer.name for layer in last_maps]
    if len({_size(layer) for layer in tokens}) > 1:
        return [layer.name for layer in _last_at_each_size(tokens, trace)]
    count = min(_BLOCKS, len(tokens))
    return [tokens[(quarter + 1) * len(tokens) // count - 1].name for quarter in range(count)]


def _last_at_each_size(layers: list[TracedLayer], trace: Trace) -> list[TracedLayer]:
    """The last layer with each number of positions, leaving out what a later block does before it strides."""
    known = {layer.name: layer for layer in trace.layers}
    sizes = {layer.name: _size(layer) for layer in layers}
    last: dict[int, tuple[int, TracedLayer]] = {}
    for layer in layers:
        strided = [name for name in _ancestors(layer.name) if _strides(known[name], layer, known, sizes)]
        rank = len(strided)
        size = _size(layer)
        if size > 1 and (size not in last or rank <= last[size][0]):
            last[size] = (rank, layer)
    return sorted((layer for _, layer in last.values()), key=lambda layer: layer.order or 0)


def _strides(block: TracedLayer, inner: TracedLayer, known: dict[str, TracedLayer], sizes: dict[str, int]) -> bool:
    """Whether ``block`` takes in the size of a layer inside it and gives another: the layer prepares the stride.

    A module of more than two sizes is a network rather than a block, and a Sequential of blocks is one too.
    """
    if block.input is None or block.output is None or block.input.neuron_axis is None:
        return False
    size = math.prod(block.input.positions)
    if size != _size(inner) or size == _size(block):
        return False
    within = f"{block.name}."
    if len({n for name, n in sizes.items() if name.startswith(within) and n > 1}) > 2:
        return False
    child = within + inner.name.removeprefix(within).split(".")[0]
    return block.kind != "Sequential" or not known[child].is_container


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


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
        is_whole = layer.is_container and all(name.startswith(f"{layer.name}.") for name in leaves)
        is_output = layer.gives_model_output and (is_whole or tensor.shape in dense_heads)
        # Windows and unfolded patches count as samples inside attention; they are no block of the network.
        if not after_head and not is_output and tensor.shape[tensor.batch_axis] == trace.batch_size:
            found.append(layer)
    return found


def _size(layer: TracedLayer) -> int:
    return math.prod(layer.output.positions) if layer.output else 0


def _is_tokens(layer: TracedLayer) -> bool:
    return layer.output is not None and len(layer.output.shape) == 3 and layer.neuron_axis == 2


def is_idle(layer: TracedLayer) -> bool:
    """Whether a map gains nothing here: noise in training alone, a placeholder, or pooling that does not shrink.

    The 7x7 pooling of VGG repeats the positions of small images.
    """
    if layer.role == "pool" and layer.input is not None and layer.output is not None:
        return math.prod(layer.output.positions) >= math.prod(layer.input.shape[2:])
    return layer.role == "dropout" or layer.kind == "Identity"


def _token_blocks(layers: list[TracedLayer]) -> list[TracedLayer]:
    """The outermost repeated blocks: of one class, named alike but for a number, that hold modules and give tokens."""
    groups: dict[tuple[str, str], list[TracedLayer]] = {}
    for layer in layers:
        if layer.is_container and _is_tokens(layer):
            groups.setdefault((re.sub(r"\d+", "#", layer.name), layer.kind), []).append(layer)
    repeated = [group for group in groups.values() if len(group) > 1]
    holders = tuple(f"{layer.name}." for group in repeated for layer in group)
    return max((group for group in repeated if not group[0].name.startswith(holders)), key=len, default=[])


def _completed(pair: LayerPair, student: Trace, teacher: Trace, total: float) -> LayerPair:
    """The pair with its share of the weight and both neuron axes, once both of its layers can be recorded."""
    given = pair.neuron_axis if isinstance(pair.neuron_axis, tuple) else (pair.neuron_axis, pair.neuron_axis)
    sides = (("student", student, pair.student, given[0]), ("teacher", teacher, pair.teacher, given[1]))
    tensors = [_recordable(side, trace, name, pair.select) for side, trace, name, _ in sides]
    if pair.select is not None and not any(_is_selected(trace, name) for _, trace, name, _ in sides):
        raise ValueError(
            f"select={pair.select!r} chooses nothing for {pair.student!r} -> {pair.teacher!r}: both give one tensor. "
            "Remove `select`."
        )
    axes = [_axis(*side, tensor) for side, tensor in zip(sides, tensors, strict=True)]
    return replace(pair, weight=pair.weight / total, neuron_axis=(axes[0], axes[1]))


def _is_selected(trace: Trace, name: str) -> bool:
    return not name.endswith(INPUT) and bool(trace.layer(name).parts)


def _axis(side: str, trace: Trace, name: str, given: int | None, tensor: TracedTensor) -> int:
    where = f"{side.capitalize()} layer {name!r} ({trace.layer(name).kind}) of shape {tensor.shape}"
    axis = tensor.neuron_axis if given is None else given
    if axis is None:
        raise ValueError(
            f"{where} has an ambiguous neuron axis: the modules that made it do not tell channels-first from "
            "channels-last. Give the pair a `neuron_axis`: 1 for (B, C, ...), -1 for (B, ..., C)."
        )
    count = len(tensor.shape)
    if not -count <= axis < count:
        raise ValueError(f"{where}: expected `neuron_axis` to lie in [{-count}, {count - 1}], but got {axis}.")
    if axis % count == tensor.batch_axis:
        raise ValueError(f"{where}: `neuron_axis` {axis} is the axis of the samples. Choose another axis.")
    return axis % count


def _recordable(side: str, trace: Trace, name: str, select: str | int | None) -> TracedTensor:
    """What a recording of the layer sees, or the error that says why it would see no representation."""
    layer = trace.layer(name)
    where = f"{side.capitalize()} layer {layer.name!r} ({layer.kind})"
    if layer.calls == 0:
        raise ValueError(f"{where} {_why_not_called(layer, trace)}")
    if layer.calls > 1:
        parent = layer.name.rpartition(".")[0]
        around = f", such as {parent!r}" if parent and trace.layer(parent).calls == 1 else ""
        raise ValueError(
            f"{where} ran {layer.calls} times in one forward, so it has no single representation. Hook a module that "
            f"runs once around or before one of the calls{around}."
        )
    tensor = trace.tensor(name, select)
    if tensor is None:
        raise ValueError(f"{where} {_why_no_tensor(layer, name, select)}")
    what = f"receives {tensor.dtype}" if name.endswith(INPUT) else f"returns {tensor.dtype}"
    if not tensor.is_floating:
        raise ValueError(
            f"{where} {what} of shape {tensor.shape}; a representation needs a real floating-point tensor to carry a "
            "gradient. Hook a layer that gives one."
        )
    if len(tensor.shape) < 2:
        raise ValueError(
            f"{where} {what} of shape {tensor.shape}; a representation needs (batch, neurons, ...). "
            "Hook an earlier layer."
        )
    return tensor


def _why_not_called(layer: TracedLayer, trace: Trace) -> str:
    if trace.root and layer.name != trace.root and not layer.name.startswith(f"{trace.root}."):
        return (
            f"did not run: the forward of {trace.root!r} was traced, and it lies outside. Name a layer inside "
            f"{trace.root!r}, or choose the `student_root` that holds it."
        )
    children = [child.name for child in trace.layers if child.name.rpartition(".")[0] == layer.name and child.name]
    if layer.is_container and any(trace.layer(child).calls for child in children):
        return (
            "is a container that is never called itself, so it has no output. Hook a child: "
            f"{', '.join(map(repr, children[:20]))}."
        )
    return (
        "did not run in this forward. Likely causes: a branch that was not taken, a branch for training only, or a "
        "parent that uses the weights without calling the module (as MultiheadAttention does). Hook a layer that runs."
    )


def _why_no_tensor(layer: TracedLayer, name: str, select: str | int | None) -> str:
    if name.endswith(INPUT):
        return "gets no tensor as a positional argument, so ':input' has nothing to record. Hook the layer before it."
    keys = [key for key, _ in layer.parts]
    if not keys:
        return f"returns {layer.output_kind}, which holds no tensor to record. Hook a layer that returns one."
    if select is not None:
        return f"returns {layer.output_kind}, without a tensor at select={select!r}. Choose `select` among {keys}."
    return (
        f"returns {layer.output_kind}, not one tensor. Choose one with "
        f"LayerPair(..., select={keys[0]!r}); there are {keys}."
    )
