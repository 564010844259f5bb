"""Warns where a text network adds tokens to its input, such as learned prompts, and the other network does not."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.layers.trace import Trace, TracedTensor
from lightning_otrt.notices import warn
from lightning_otrt.reading.masks.names import is_mask_name

__all__ = ["warn_of_added_tokens"]


def warn_of_added_tokens(pairs: Sequence[LayerPair], student: Trace, teacher: Trace) -> None:
    """Warn once for each side whose layers have more tokens beyond its input than the layers that they are matched to.

    Tokens alone are compared, of networks that get ids or a mask: other networks, such as those of speech, may change
    the length of a sequence in many ways. ``LayerPair(mask=None)`` says that the tokens are meant.

    Args:
        pairs: The pairs.
        student: Trace of the student.
        teacher: Trace of the teacher.
    """
    sides: dict[str, dict[str, int]] = {}
    for pair in pairs:
        own = _added_tokens(student, student.tensor(pair.student, pair.select))
        other = _added_tokens(teacher, teacher.tensor(pair.teacher, pair.select))
        if own is None or other is None or own == other or None in pair.masks:
            continue
        side, layer = ("student", pair.student) if own > other else ("teacher", pair.teacher)
        sides.setdefault(side, {})[layer] = abs(own - other)
    for side, layers in sides.items():
        warn(
            f"The {side} adds {max(layers.values())} more tokens to its input than the other network, such as learned "
            f"prompts. In its layers {list(layers)} they are averaged like the others, so that the positions of a pair "
            "do not match. Put an nn.Identity behind the place where the network cuts them off again, and match that "
            "layer with neuron_axis=-1; or pass LayerPair(mask=None) if this is meant.",
        )


def _added_tokens(trace: Trace, tensor: TracedTensor | None) -> int | None:
    """How many tokens a layer ``(B, T, C)`` has beyond the input of its network; None where that is not known."""
    if tensor is None or len(tensor.shape) != 3 or len(tensor.positions) != 1 or tensor.neuron_axis != 2:
        return None
    samples, tokens = tensor.shape[tensor.batch_axis], tensor.positions[0] - trace.prefix_tokens
    shapes = [known.shape for known in trace.arguments if is_mask_name(known.source.argument)]
    shapes += [
        layer.input.shape
        for layer in trace.layers
        if layer.takes_model_input and layer.input is not None and not layer.input.is_floating
    ]
    lengths = {shape[1] for shape in shapes if shape is not None and len(shape) == 2 and shape[0] == samples}
    # One of several sequences, as of an encoder and its decoder, may be longer than another.
    added = [max(tokens - length, 0) for length in lengths if tokens + trace.prefix_tokens >= length]
    return min(added, default=None)
