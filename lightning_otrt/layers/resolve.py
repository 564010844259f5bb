"""From a specification of layers and two traces to pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_otrt.layers.automatic import block_names
from lightning_otrt.layers.depth import pair_blocks
from lightning_otrt.layers.grammar import WORDS, LayerEntry, parse_layers
from lightning_otrt.layers.graphs import graph_hint
from lightning_otrt.layers.head import penultimate_names
from lightning_otrt.layers.lookup import LayerNames, pair_up, reject_duplicates
from lightning_otrt.layers.model_output import assumed_output
from lightning_otrt.layers.no_blocks import nothing_found, why_no_blocks
from lightning_otrt.layers.pairs import INPUT, LayerPair, LayerSpec
from lightning_otrt.layers.recordable import check_common_axis, chosen_axis, recorded_tensor
from lightning_otrt.layers.trace import Trace

__all__ = ["fallback_note", "output_note", "resolve_layers", "select_layers"]

#: Finds pairs (student layer, teacher layer) from activations.
FindMatches = Callable[[], Sequence[tuple[str, str]]]

_RULES: dict[str, Callable[[Trace], list[str]]] = {"blocks": block_names, "penultimate": penultimate_names}


def resolve_layers(
    spec: LayerSpec, student: Trace, teacher: Trace, find_matches: FindMatches | None = None
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
        spec: What the user passed as ``layers``. In a list, a list or tuple of two is a pair; a mapping with the keys
            ``student`` and ``teacher`` holds the fields of one :class:`LayerPair`.
        student: Trace of the student; names are looked up in the whole model first, then relative to its root.
        teacher: Trace of the teacher; the same.
        find_matches: Finds the pairs of ``"matched"``, which need activations; called for that word only.

    Returns:
        Pairs with full names, weights that sum to 1, and the non-negative neuron axes ``(student, teacher)``.

    Raises:
        TypeError: If an element of ``spec`` is none of the accepted forms.
        ValueError: If a name is unknown, a layer gives no representation, two patterns find different numbers of
            layers, or a pair is named twice.

    Example:
        >>> from lightning_otrt.layers.trace import TracedLayer, TracedTensor
        >>> layers = [TracedLayer(name, order=i, calls=1, output=TracedTensor((4, 5), neuron_axis=1))
        ...           for i, name in enumerate(["conv1", "conv2", ""])]
        >>> trace = Trace(tuple(layers))
        >>> [(pair.student, pair.teacher) for pair in resolve_layers([{-1: "conv1"}, "conv2"], trace, trace)]
        [('conv2', 'conv1'), ('conv2', 'conv2')]
    """
    pairs = []
    for entry in parse_layers(spec):
        pairs += _expand(entry, student, teacher, find_matches)
    try:
        reject_duplicates(pairs)
    except ValueError as error:
        if not (note := fallback_note(spec, student, teacher)):
            raise
        raise ValueError(f"{note} {error}") from None
    total = math.fsum(pair.weight for pair in pairs)
    return tuple(_completed(pair, student, teacher, total) for pair in pairs)


def fallback_note(spec: LayerSpec, student: Trace, teacher: Trace) -> str:
    """Says that "auto" or "matched" took the penultimate layer instead of blocks, and why; empty if it did not."""
    words = [entry.student for entry in parse_layers(spec) if entry.student in ("auto", "matched")]
    without = [(side, trace) for side, trace in (("student", student), ("teacher", teacher)) if not block_names(trace)]
    if not words or not without:
        return ""
    kinds = [f"{side} ({trace.layer(trace.root).kind})" for side, trace in without]
    reasons = [why_no_blocks(trace, side) for side, trace in without]
    # A part that is the root of the student is that of the teacher, too.
    if len({why_no_blocks(trace, "student") for _, trace in without}) == 1:
        kinds, reasons = [" and ".join(kinds)], reasons[:1]
    told = " ".join(f"{kind[0].upper()}{kind[1:]}: {reason}" for kind, reason in zip(kinds, reasons, strict=True))
    return f'No blocks were found, so "{words[0]}" uses "penultimate". {told}'


def output_note(spec: LayerSpec, student: Trace, teacher: Trace) -> str:
    """Says which layers are taken for the output of a network that does not show it, where words choose the layers."""
    if not any(entry.student in WORDS or entry.teacher in WORDS for entry in parse_layers(spec)):
        return ""
    lines = [
        f"the {side} ({trace.layer(trace.root).kind}) returns no logits, map or tokens. These layers are taken to make "
        f"its output, and are left out: {', '.join(map(repr, made))}. If that is wrong, name the layers to match."
        for side, trace in (("student", student), ("teacher", teacher))
        if (made := assumed_output(trace))
    ]
    return "\n".join(lines)


def select_layers(selectors: Sequence[str | int], trace: Trace, side: str) -> dict[str, int]:
    """The layers of one model that names, patterns, indices, "blocks" or "penultimate" stand for, with neuron axes.

    Raises:
        ValueError: If a name is unknown, or a layer gives no representation.

    Example:
        >>> from lightning_otrt.layers.trace import TracedLayer, TracedTensor
        >>> layers = [TracedLayer(name, order=i, calls=1, output=TracedTensor((2, 4, 6, 6), neuron_axis=1))
        ...           for i, name in enumerate(["conv1", "conv2", ""])]
        >>> select_layers([-1, "conv1"], Trace(tuple(layers)), "student")
        {'conv2': 1, 'conv1': 1}
    """
    names, no_names = _names(side, trace), LayerNames("", ())
    found = [name for selector in selectors for name in _choose(selector, trace, names, no_names)]
    return {name: chosen_axis(side, trace, name, None, recorded_tensor(side, trace, name)) for name in found}


def _expand(entry: LayerEntry, student: Trace, teacher: Trace, find_matches: FindMatches | None) -> list[LayerPair]:
    """The pairs that one element stands for."""
    if entry.student in ("auto", "matched"):
        have_blocks = bool(block_names(student)) and bool(block_names(teacher))
        if entry.student == "matched" and have_blocks:
            if find_matches is None:
                raise ValueError('"matched" pairs layers by their activations, and a trace alone has none.')
            return [entry.pair(*names) for names in find_matches()]
        if not have_blocks:
            try:
                return _expand(replace(entry, student="penultimate", teacher="penultimate"), student, teacher, None)
            except ValueError as error:
                if graph_hint(student, "student") or graph_hint(teacher, "teacher"):
                    raise  # which says all of the note
                raise ValueError(f"{fallback_note(str(entry.student), student, teacher)} {error}") from None
        entry = replace(entry, student="blocks", teacher="blocks")
    if entry.student == entry.teacher == "blocks" and block_names(student) and block_names(teacher):
        return [entry.pair(*pair) for pair in pair_blocks(student, teacher)]
    names = _names("student", student), _names("teacher", teacher)
    student_layers = _choose(entry.student, student, names[0], names[1])
    teacher_layers = _choose(entry.teacher, teacher, names[1], names[0])
    return pair_up(entry, student_layers, teacher_layers)


def _names(side: str, trace: Trace) -> LayerNames:
    return LayerNames(side, trace.names(), trace.root, kind=trace.layer(trace.root).kind)


def _choose(selector: str | int, trace: Trace, names: LayerNames, other: LayerNames) -> list[str]:
    if isinstance(selector, int):
        return [_by_index(selector, trace, names.side)]
    if selector in WORDS:
        found = _RULES[selector](trace)
        if not found:
            raise ValueError(nothing_found(selector, trace, names.side))
        return found
    # A module under two names is one layer: pairs carry its first name, so that duplicates are noticed.
    return [trace.layer(name).name + (INPUT if name.endswith(INPUT) else "") for name in names.find(selector, other)]


def _by_index(index: int, trace: Trace, side: str) -> str:
    recordable = trace.recordable()
    count = len(recordable)
    if not -count <= index < count:
        raise ValueError(
            f"Index {index} is out of range in the {side}: it has {count} recordable layers, so an index lies in "
            f"[{-count}, {count - 1}]. Negative indices count from the layer that completes last."
        )
    return recordable[index].name


def _completed(pair: LayerPair, student: Trace, teacher: Trace, total: float) -> LayerPair:
    """The pair with its share of the weight and both neuron axes, after a check that both layers can be recorded."""
    sides = (("student", student, pair.student, pair.axes[0]), ("teacher", teacher, pair.teacher, pair.axes[1]))
    tensors = [recorded_tensor(side, trace, name, pair.select) for side, trace, name, _ in sides]
    if pair.select is not None and not any(_has_parts(trace, name) for _, trace, name, _ in sides):
        raise ValueError(
            f"select={pair.select!r} chooses nothing for {pair.student!r} -> {pair.teacher!r}: both give one tensor. "
            "Remove `select`."
        )
    if isinstance(pair.neuron_axis, int):
        check_common_axis(pair.neuron_axis, pair.student, pair.teacher, (tensors[0], tensors[1]))
    axes = [chosen_axis(*side, tensor) for side, tensor in zip(sides, tensors, strict=True)]
    return replace(pair, weight=pair.weight / total, neuron_axis=(axes[0], axes[1]))


def _has_parts(trace: Trace, name: str) -> bool:
    return not name.endswith(INPUT) and bool(trace.layer(name).parts)
