"""Which layers of a network are worth comparing with those of another one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from lightning_otrt.checks import is_int, shown
from lightning_otrt.layers.automatic import adds_nothing, linear_maps
from lightning_otrt.layers.grammar import written
from lightning_otrt.layers.head import classification_head
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.resolve import select_layers
from lightning_otrt.layers.trace import LINEAR, Trace, TracedLayer

__all__ = ["LayerChoice", "choose_layers", "comparable_layers"]

#: A choice of layers of one network; see :func:`choose_layers`.
LayerChoice: TypeAlias = str | int | Sequence[str | int]

#: A network seldom has more blocks than this; more layers are parts of blocks.
_AT_MOST = 40


def comparable_layers(trace: Trace, *, at_most: int = _AT_MOST) -> tuple[str, ...]:
    """The layers of a network that are worth comparing with those of another one: blocks, not every operation.

    Starting from the whole network, containers are opened level by level: sequences, and modules that hold numbered
    blocks of one type, each with several linear maps. A level is added as long as there are at most ``at_most`` layers
    in all. Of consecutive layers without children, the last one before the next linear map is taken: of a convolution,
    its normalisation and its activation this is the activation. Left out are the classification head and what comes
    after it, layers that run more than once, layers without a known neuron axis, layers that add nothing in evaluation
    mode, children whose output their parent returns unchanged, and a second container of the same modules.

    Args:
        trace: One forward of the network.
        at_most: Largest number of layers. There may be more if the first level with any layer has more.

    Returns:
        Names in the order of completion.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_otrt.reading.tracer import trace
        >>> hidden = [nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh()]
        >>> net = nn.Sequential(*hidden, nn.Linear(6, 3))
        >>> comparable_layers(trace(net, (torch.randn(4, 6),)))
        ('2', '4')
    """
    children = _children(trace)
    head = classification_head(trace)
    usable = {layer.name: layer for layer in trace.layers if _is_usable(layer, trace, head)}
    known = {layer.name: layer for layer in trace.layers}
    found: dict[str, TracedLayer] = {}
    level = [trace.root]
    while level:
        new: dict[str, TracedLayer] = {}
        for name in (each for parent in level for each in _representatives(children[parent], usable, known)):
            same = [other.name for other in (*found.values(), *new.values()) if _give_one(other, usable[name])]
            # A child of one that returns its tensor, or a second container of the same modules.
            is_second = bool(same) and known[name].is_container and not children[name]
            if not is_second and not any(name.startswith(f"{other}.") for other in same):
                new[name] = usable[name]
        if found and len(found) + len(new) > at_most:
            break
        found.update(new)
        level = [name for parent in level for name in children[parent] if _is_opened(known[name], usable, known)]
    return tuple(sorted(found, key=lambda name: found[name].order or 0))


def choose_layers(choice: LayerChoice, trace: Trace, side: str) -> dict[str, int]:
    """The layers of one network that a choice stands for, with their neuron axes, in the order of the network.

    Args:
        choice: ``"auto"`` (:func:`comparable_layers`), ``"all"`` (all that can be recorded), names, globs,
            ``"re:..."``, indices, ``"name:input"``, ``"blocks"`` or ``"penultimate"``; one or a list of them.
        trace: One forward of the network.
        side: ``"student"`` or ``"teacher"``, for errors.

    Raises:
        TypeError: If it is neither a name, an index nor a list of them.
        ValueError: If a name is unknown, or there is no layer.
    """
    selectors = list(choice) if isinstance(choice, Sequence) and not isinstance(choice, str) else [choice]
    if not all(isinstance(name, str) or is_int(name) for name in selectors):
        raise TypeError(
            f"Expected the layers of the {side} to be a name, an index or a list of these, but got {shown(choice)}. "
            "`layers` and `teacher_layers` are two lists, not pairs."
        )
    names: list[str | int] = []
    for selector in selectors:
        if selector == "auto":
            names += map(written, comparable_layers(trace))
        elif selector == "all":
            names += [written(layer.name) for layer in trace.recordable() if layer.neuron_axis is not None]
        elif selector == "matched":
            raise ValueError('"matched" pairs layers; here they are all compared. Use "auto" or "blocks".')
        else:
            names.append(selector)
    found = select_layers(names, trace, side)
    # The pairing relies on the order of the network, in which the input of a layer comes before its output.
    found = dict(sorted(found.items(), key=lambda item: (trace.layer(item[0]).order or 0, not item[0].endswith(INPUT))))
    if not found:
        option = "layers" if side == "student" else "teacher_layers"
        raise ValueError(f"No layer of the {side} can be compared. Name its layers, such as {option}=['fc:input'].")
    return found


def _children(trace: Trace) -> dict[str, list[str]]:
    """Modules that ran, by the next module around them that ran, in order of completion."""
    called = {layer.name for layer in trace.layers if layer.calls} | {trace.root}
    children: dict[str, list[str]] = {layer.name: [] for layer in trace.layers}
    for layer in sorted(trace.layers, key=lambda layer: layer.order or 0):
        if layer.name in called and layer.name != trace.root:
            parent = layer.name.rpartition(".")[0]
            while parent and parent not in called:
                parent = parent.rpartition(".")[0]
            if parent in children:
                children[parent].append(layer.name)
    return children


def _is_usable(layer: TracedLayer, trace: Trace, head: TracedLayer | None) -> bool:
    tensor = layer.output
    if not layer.is_recordable or layer.name == trace.root or tensor is None or tensor.neuron_axis is None:
        return False
    if head is not None and (layer.order or 0) >= (head.order or 0):
        return False
    return trace.is_sample_count(tensor.shape[tensor.batch_axis]) and not adds_nothing(layer)


def _representatives(names: list[str], usable: dict[str, TracedLayer], known: dict[str, TracedLayer]) -> Iterator[str]:
    """All containers among siblings, and the last of each group of layers without children."""
    last: str | None = None
    for name in names:
        layer = known[name]
        starts = layer.is_container or layer.role in (*LINEAR, "recurrent") or "Embedding" in layer.kind
        if starts and last is not None:
            yield last
            last = None
        if name in usable:
            if layer.is_container:
                yield name
            else:
                last = name
    if last is not None:
        yield last


def _give_one(layer: TracedLayer, other: TracedLayer) -> bool:
    """Whether two layers return the very same tensor."""
    return layer.output_from == other.output_from


def _is_opened(layer: TracedLayer, usable: dict[str, TracedLayer], known: dict[str, TracedLayer]) -> bool:
    if not layer.is_container:
        return False
    if layer.name not in usable or layer.kind == "Sequential":
        return True
    # A numbered module with one linear map, such as a convolution with its normalisation, is no block.
    inside = [known[name] for name in known if name.startswith(f"{layer.name}.")]
    blocks = [block for block in inside if block.is_container and linear_maps(block, inside) > 1]
    return max(Counter((re.sub(r"\d+", "#", block.name), block.kind) for block in blocks).values(), default=0) > 1
