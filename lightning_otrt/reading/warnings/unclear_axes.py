"""The warning where words leave out stacks of blocks, since it is not known along which axis their neurons lie."""

from __future__ import annotations

from lightning_otrt.layers.automatic import unclear_stacks
from lightning_otrt.layers.grammar import WORDS, parse_layers
from lightning_otrt.layers.pairs import LayerSpec
from lightning_otrt.layers.trace import Trace
from lightning_otrt.notices import warn

__all__ = ["warn_of_unclear_axes"]


def warn_of_unclear_axes(layers: LayerSpec, student: Trace, teacher: Trace) -> None:
    """Warn where other blocks are found, so that the choice goes on without those of an unknown neuron axis.

    Args:
        layers: What the user passed as ``layers``.
        student: Trace of the student.
        teacher: Trace of the teacher.
    """
    if not any({entry.student, entry.teacher} & {*WORDS} - {"penultimate"} for entry in parse_layers(layers)):
        return
    for side, trace in (("student", student), ("teacher", teacher)):
        for stack in unclear_stacks(trace):
            first, last = stack[0], stack[-1]
            warn(
                f"{len(stack)} blocks of the {side}, from {first.name!r} to {last.name!r} ({last.kind}), are left out "
                f"by {layers!r}: it is not known which axis of their shape {last.output_shape} holds the neurons. To "
                f"match them, name them with a `neuron_axis`, as LayerPair({last.name!r}, {last.name!r}, "
                "neuron_axis=-1) for (B, T, C), or use a batch of other sizes.",
            )
