"""What to say of a network in which no blocks were found: what it has, why these are none, and what to write."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_otrt.layers.automatic import adds_nothing, block_candidates
from lightning_otrt.layers.grammar import written
from lightning_otrt.layers.graphs import graph_hint
from lightning_otrt.layers.head import classification_head, penultimate_names
from lightning_otrt.layers.inner_network import inner_hint
from lightning_otrt.layers.repeats import end_of_loop, feeds_itself, repeated_parts
from lightning_otrt.layers.trace import Trace, TracedLayer

__all__ = ["nothing_found", "why_no_blocks"]

#: Layers that a message names, at most.
_SHOWN = 4


def nothing_found(word: str, trace: Trace, side: str) -> str:
    """The error of ``"blocks"`` or ``"penultimate"`` where a network has none."""
    kind = trace.layer(trace.root).kind
    if graph := graph_hint(trace, side):
        return f'"{word}" finds nothing in the {side} ({kind}): {graph}'
    if word == "blocks":
        other = ' Or use "penultimate".' if penultimate_names(trace) else ""
        message = f'"blocks" finds none in the {side} ({kind}): {why_no_blocks(trace, side)}{other}'
    elif (head := classification_head(trace)) is not None:
        message = (
            f"The classification head {head.name!r} ({head.kind}) of the {side} ({kind}) ran {head.calls} times in one "
            "forward, but a representation is the output of one call. Name a layer that runs once. Where the network "
            "takes several inputs, call it once for each of them, or pass as `student_root` a part that runs once for "
            "each."
        )
    else:
        message = (
            f"No classification head was found in the {side} ({kind}): its forward does not end with a Linear or 1x1 "
            "convolution with a 2-D output. Name the layer, as 'fc:input'."
        )
    return message + inner_hint(trace, side)


def why_no_blocks(trace: Trace, side: str) -> str:
    """What a network without blocks has, why these are no blocks, and what to write: some sentences.

    Args:
        trace: Trace of the network.
        side: ``"student"`` or ``"teacher"``.
    """
    if inner_hint(trace, side):  # which says what to pass
        return "the layers are those of a network inside of it."
    if graph := graph_hint(trace, side):
        return graph
    repeats = _repeats(trace, side)
    tokens = _outermost([each for each in block_candidates(trace) if each.output and each.output.position_count > 1])
    if repeats:
        others = f" Layers that run once and have positions or tokens: {_last_names(tokens, trace)}." if tokens else ""
        return repeats + others
    unknown = [each for each in trace.recordable() if len(each.output_shape or ()) > 2 and each.neuron_axis is None]
    has_unknown_blocks = any(layer.is_container and layer.name != trace.root for layer in unknown)
    if tokens and not has_unknown_blocks:
        return (
            "the layers with tokens give no maps, and they are not a stack of numbered modules of one type, such as "
            f"`layers.0` and `layers.1`. To match such layers, name them: layers={_last_names(tokens, trace)}."
        )
    if unknown:
        unknown.sort(key=lambda layer: layer.is_container)
        name, shape = unknown[-1].name, unknown[-1].output_shape
        own = _of_both(name, trace)
        return (
            f"the types of the modules do not tell which axis of {name!r} (shape {shape}) holds the neurons. Give it: "
            f"LayerPair({own!r}, {own!r}, neuron_axis=1) for (B, C, ...), or neuron_axis=-1 for (B, ..., C); "
            "neuron_axis=(student, teacher) where the two differ."
        )
    rows = _rows(trace)
    if not rows:
        return "no layer has positions or tokens."
    return (
        f"the layers have no positions or tokens (for example {rows[-1].name!r}, shape {rows[-1].output_shape}). To "
        f"match such layers, name them: layers={_last_names(rows, trace)}."
    )


def _repeats(trace: Trace, side: str) -> str:
    """Says which parts run several times, and what to do; empty if none does."""
    parts = repeated_parts(trace)
    if not parts:
        return ""
    shown = " and ".join(f"{part.name!r} ({part.kind}) {part.calls} times" for part in parts[:_SHOWN])
    if loop := next((part for part in parts if feeds_itself(part)), None):
        end = end_of_loop(trace, loop)
        name = "" if end is None else _of_both(end[0], trace)
        remedy = (
            "Put the loop into a module of its own, and name that in `layers`."
            if end is None
            else f"Name the module around the loop: layers=[LayerPair({name!r}, {name!r})]."
            if end[1] is None
            else f"Name the module around the loop: layers=[LayerPair({name!r}, {name!r}, select={end[1]!r})]."
        )
        return (
            f"one forward runs {shown}, each time on the output of the run before, but a representation is the output "
            f"of one call. {remedy}"
        )
    part = next((part for part in parts if part.takes_model_input), parts[0])
    part_alone = (
        f"pass student_root={part.name!r}: each call is then a forward of its own"
        if side == "student"
        else f"pass its part {part.name!r} as the teacher"
    )
    return (
        f"one forward runs {shown}, as for several views of a sample, but a representation is the output of one call. "
        f"Call the {side} once for each of them, or {part_alone}."
    )


def _rows(trace: Trace) -> list[TracedLayer]:
    """Layers ``(N, C)`` before those that make the output, the outermost."""
    made = tuple(f"{layer.name}." for layer in trace.layers if layer.gives_model_output and layer.name != trace.root)
    found = [layer for layer in trace.recordable() if len(layer.output_shape or ()) == 2]
    return _outermost(
        [layer for layer in found if not layer.gives_model_output and not f"{layer.name}.".startswith(made)]
    )


def _outermost(layers: Sequence[TracedLayer]) -> list[TracedLayer]:
    around = tuple(f"{layer.name}." for layer in layers)
    return [layer for layer in layers if not layer.name.startswith(around) and not adds_nothing(layer)]


def _last_names(layers: Sequence[TracedLayer], trace: Trace) -> list[str]:
    return [_of_both(layer.name, trace) for layer in layers[-_SHOWN:]]


def _of_both(name: str, trace: Trace) -> str:
    """A name as the other network has it, too: without that of the root, and not one that is read as a word."""
    return written(name.removeprefix(f"{trace.root}.") if trace.root else name)
