"""The classification head of a traced model, and what enters it: the rule behind "penultimate" in ``layers=``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_otrt.layers.model_output import passes_on
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace, TracedLayer

__all__ = ["classification_head", "input_before_dropout", "penultimate_names"]


def penultimate_names(trace: Trace) -> list[str]:
    """What enters the classification head, as a list of one name; empty where none is found that runs once."""
    head = _head_of_logits(trace) or classification_head(trace)
    return [] if head is None or head.calls > 1 else [input_before_dropout(trace, head)]


def input_before_dropout(trace: Trace, layer: TracedLayer) -> str:
    """What enters a layer, or what enters a dropout before it: behind a dropout the student alone has noise."""
    before = trace.layer(layer.input_from) if layer.input_from is not None else None
    if before and before.role == "dropout" and before.calls == 1 and before.input and before.input.neuron_axis:
        return before.name + INPUT
    return layer.name + INPUT


def _head_of_logits(trace: Trace) -> TracedLayer | None:
    """The layer that makes the tensor called logits, where a network returns several: another one may run last."""
    root = trace.layer(trace.root)
    parts = dict(root.parts)
    key = root.fields.index("logits") if "logits" in root.fields else "logits"
    logits = parts.get(key)
    if len(parts) < 2 or logits is None or len(logits.shape) != 2 or logits.made_by is None:
        return None
    made_by = trace.layer(logits.made_by)
    return made_by if made_by.role in ("linear", "pointwise") else None


def classification_head(trace: Trace) -> TracedLayer | None:
    """The last linear map that ran, if only pooling or an activation stands between it and a 2-D output.

    An output ``(B,)`` may be one logit without its axis. Of a network that returns no tensor of more axes, such as its
    loss alone, the last linear map is taken at any width.
    """
    widths = {shape[1] if len(shape) == 2 else 1 for shape in trace.output_shapes if len(shape) in (1, 2)}
    ran = [layer for layer in trace.layers if layer.order is not None and layer.name != trace.root]
    after: list[TracedLayer] = []
    for layer in sorted(ran, key=lambda layer: layer.order or 0, reverse=True):
        output = layer.output
        if layer.role in ("linear", "pointwise") and output is not None and output.neuron_axis is not None:
            if len(output.shape) > 2 and _is_of_stack(layer, ran):
                return None
            if len(output.shape) == 2 and any(_is_weighed_by(layer, later) for later in after):
                return None
            is_assumed = not trace.shows_output and len(output.shape) == 2
            return layer if is_assumed or output.shape[output.neuron_axis] in widths else None
        if not layer.is_container:
            if not passes_on(layer):
                return None
            after.append(layer)
    return None


def _is_weighed_by(gate: TracedLayer, layer: TracedLayer) -> bool:
    """Whether a layer gets a map that depends on this linear map, as on the gate of a squeeze-and-excitation.

    Something else enters that, too: logits of frames or patches, which are averaged behind the head, come alone.
    """
    is_map = layer.input is not None and len(layer.input.shape) > 2
    return is_map and gate.name in layer.reached_by and len(layer.reached_by) > 1


def _is_of_stack(layer: TracedLayer, others: Sequence[TracedLayer]) -> bool:
    """Whether a layer belongs to the last of several numbered blocks: an earlier one has the same layer."""
    around, _, last = layer.name.rpartition(".")
    pattern = re.compile(re.sub(r"\d+", r"\\d+", re.escape(around)) + re.escape(f".{last}"))
    return re.search(r"\d", around) is not None and any(
        other.name != layer.name and other.output_shape == layer.output_shape and pattern.fullmatch(other.name)
        for other in others
    )
