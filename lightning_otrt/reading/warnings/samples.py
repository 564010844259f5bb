"""Warnings where the observations of student and teacher may be of different samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeAlias

from lightning_otrt.layers.names import listed
from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor
from lightning_otrt.notices import warn
from lightning_otrt.reading.traced.token_grid import find_token_grid, has_hidden_grid

__all__ = ["warn_of_hidden_grids", "warn_of_other_axes", "warn_of_other_samples"]

#: Layers that a warning names; the others it counts.
_SHOWN = 8
#: The side in words, the trace of its network, and its layers.
_Side: TypeAlias = tuple[str, Trace, list[str]]


def warn_of_other_samples(pairs: Sequence[LayerPair], student: Trace, teacher: Trace) -> None:
    """Warn once of noise that each network draws for itself, of samples in another order, and of unclear axes.

    Args:
        pairs: The layers that are matched or compared.
        student: Trace of the student.
        teacher: Trace of the teacher.
    """
    sides = (
        ("student", student, [pair.student for pair in pairs]),
        ("teacher", teacher, [pair.teacher for pair in pairs]),
    )
    _warn_of_noise(sides)
    _warn_of_other_order(pairs, student, teacher)
    _warn_of_chosen_rows(pairs, sides)
    _warn_of_unclear_samples(sides)


def warn_of_other_axes(student: Trace, teacher: Trace) -> None:
    """Warn where one network takes ``(B, T, ...)`` and the other one ``(T, B, ...)``, and both get the same inputs.

    Where B and T differ, the batches of the two cannot be matched, which is an error later.

    Args:
        student: Trace of the student.
        teacher: Trace of the teacher.
    """
    axes = student.sample_axis, teacher.sample_axis
    if None not in axes and axes[0] != axes[1]:
        kinds = [trace.layer(trace.root).kind for trace in (student, teacher)]
        warn(
            f"The student ({kinds[0]}) has the samples along axis {axes[0]} of its sequences, and the teacher "
            f"({kinds[1]}) along axis {axes[1]}, but both get the same inputs. So a sample of one network is a time "
            "step of the other, and unlike things are matched. Let `teacher_inputs` exchange the axes, as in "
            "`lambda x: x.transpose(0, 1)`.",
        )


def _warn_of_noise(sides: Sequence[_Side]) -> None:
    """Warn once where networks draw random numbers although they run in evaluation mode."""
    drawing = [f"the {side} ({trace.layer(trace.root).kind})" for side, trace, _ in sides if trace.is_random]
    if drawing:
        warn(
            f"The forward of {' and that of '.join(drawing)} draws random numbers although it runs in evaluation mode, "
            "such as noise, time steps or masks. Unless both networks draw the same numbers in the same order, they "
            "are matched under different noise. Draw them outside and pass them as an argument, name the network that "
            "gets them as `student_root`, or give the teacher the same ones with `teacher_inputs`.",
        )


def _warn_of_other_order(pairs: Sequence[LayerPair], student: Trace, teacher: Trace) -> None:
    """Warn where one of two matched layers holds the samples in another order."""
    moved: dict[str, dict[str, None]] = {"student": {}, "teacher": {}}
    for pair in pairs:
        found = pair.student in student.reordered, pair.teacher in teacher.reordered
        # Of chosen rows, which may stand in any order, another warning tells.
        has_chosen_rows = pair.student in student.chosen_rows or pair.teacher in teacher.chosen_rows
        if found[0] != found[1] and not has_chosen_rows:
            side, name = ("student", pair.student) if found[0] else ("teacher", pair.teacher)
            moved[side][name] = None
    for side, layers in moved.items():
        if layers:
            warn(
                f"The {side} layers {listed([*layers], _SHOWN)} hold the samples in another order than the "
                "inputs, such as sorted by length or flipped, and the layers that they are matched to do not. So "
                "different samples are matched. Order the batch before both networks; packing with "
                "enforce_sorted=False needs no sorting.",
            )


def _warn_of_chosen_rows(pairs: Sequence[LayerPair], sides: Sequence[_Side]) -> None:
    """Warn where a network may choose its rows."""
    for place, (side, trace, layers) in enumerate(sides):
        tensors = {layer: _tensor(trace, pair, place) for layer, pair in zip(layers, pairs, strict=True)}
        odd = [name for name, tensor in tensors.items() if tensor and _has_chosen_rows(trace, tensor)]
        others = [name for name in tensors if name in trace.chosen_rows and name not in odd]
        what = {
            "have a number of rows that is neither that of the samples nor that of all their positions": odd,
            "have rows that do not follow the samples when these are in another order": others,
        }
        for problem, chosen in what.items():
            if chosen:
                warn(
                    f"The {side} layers {chosen} {problem}. The network may choose its rows, as for the experts of a "
                    "mixture or the proposals of a detector, and the other network chooses different ones. Then "
                    "different rows are matched. Name the module around them, which gives all tokens. Where both "
                    "networks have the same rows, such as the valid tokens, nothing is wrong.",
                )


def _warn_of_unclear_samples(sides: Sequence[_Side]) -> None:
    """Warn where nothing tells which axis of a layer holds the samples."""
    for side, trace, layers in sides:
        unclear = sorted({name for name in layers if name in trace.unclear_axes})
        if unclear:
            warn(
                f"The first batch has as many samples as its sequences have positions ({trace.batch_size}), and "
                f"nothing tells which axis of the {side} layers {unclear} holds the samples: it is taken to be axis "
                f"{trace.layer(unclear[0]).batch_axis}. Begin with a batch of another size, or set `batch_first` on "
                "the network.",
            )


def warn_of_hidden_grids(pairs: Sequence[LayerPair], student: Trace, teacher: Trace) -> None:
    """Warn once where patches that no map shows are read as sequences of different lengths.

    Args:
        pairs: The resolved pairs.
        student: Trace of the student.
        teacher: Trace of the teacher.
    """
    found = []
    for pair in pairs:
        sides = (student, pair.student), (teacher, pair.teacher)
        read = [(trace, trace.layer(name), trace.tensor(name, pair.select)) for trace, name in sides]
        if len({_tokens(*one) for one in read} - {None}) < 2:
            continue
        if any(tensor and has_hidden_grid(trace, layer, tensor) for trace, layer, tensor in read):
            found.append(f"{pair.student} -> {pair.teacher}")
    if found:
        warn(
            f"The pairs {found} have different numbers of tokens. These are patches of images, but no layer gives a "
            "map that shows their rows and columns, as a convolution does. So the tokens are read as sequences, and a "
            "segment of them is another part of the image in the student than in the teacher. Embed the patches by a "
            "convolution, match networks with equal numbers of tokens, or pass grid=1.",
        )


def _tokens(trace: Trace, layer: TracedLayer, tensor: TracedTensor | None) -> int | None:
    """The number of tokens, without class and register tokens; 0 for other layers."""
    if tensor is None or len(tensor.shape) != 3:
        return None if tensor is None else 0
    return tensor.shape[1 - tensor.batch_axis] - find_token_grid(trace, layer, tensor).prefix


def _tensor(trace: Trace, pair: LayerPair, place: int) -> TracedTensor | None:
    return trace.tensor((pair.student, pair.teacher)[place], pair.select)


def _has_chosen_rows(trace: Trace, tensor: TracedTensor) -> bool:
    """Whether a tensor ``(rows, features)`` has rows that are neither samples nor the positions of all samples."""
    rows = tensor.shape[0]
    if len(tensor.shape) != 2 or trace.is_sample_count(rows):
        return False
    tensors = [tensor for layer in trace.layers for tensor in (layer.input, layer.output) if tensor is not None]
    wide = [tensor for tensor in tensors if len(tensor.shape) > 2]
    # Valid tokens alone, or packed ones, may be any number.
    has_padding = any(layer.has_own_mask or any(mask.padded for mask in layer.masks) for layer in trace.layers)
    if not wide or has_padding:
        return False
    entered = {size for shape in trace.layer(trace.root).input_shapes for size in shape}  # edges of a graph
    samples = trace.batch_size  # 0 for a list of images
    folded = {tensor.shape[0] for tensor in wide if samples and tensor.shape[0] % samples == 0}  # windows, views
    counts = {
        samples * math.prod(axes)
        for tensor in wide
        for samples in tensor.shape[tensor.batch_axis : tensor.batch_axis + 1]
        for number in range(len(tensor.positions) + 1)
        for axes in itertools.combinations(tensor.positions, number)
        if trace.is_sample_count(samples) or samples in folded
    }
    return rows not in {*entered, *folded, *counts}
