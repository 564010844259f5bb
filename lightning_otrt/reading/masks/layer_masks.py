"""The padding masks of a layer that is recorded. ``warnings.py`` warns where padding is not left out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from lightning_otrt.layers.mask_sources import LayerMasks, TracedMask, choose_masks
from lightning_otrt.layers.pairs import INPUT, LayerPair
from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor
from lightning_otrt.reading.masks.names import is_mask_name, may_mark_padding
from lightning_otrt.reading.masks.padded_ids import BY_IDS
from lightning_otrt.reading.masks.search import holds_lengths
from lightning_otrt.reading.masks.values import unknown_polarity
from lightning_otrt.reading.traced.token_grid import find_token_grid

__all__ = ["flat_mask", "layer_masks", "named_masks", "pair_masks", "with_unread"]


def layer_masks(
    side: str, trace: Trace, name: str, axis: int | None, select: str | int | None = None, mask: str | None = "auto"
) -> LayerMasks:
    """The padding masks of one layer; none if it is no sequence.

    Args:
        side: ``"student"`` or ``"teacher"``, for errors.
        trace: Trace of its network.
        name: ``"name"`` or ``"name:input"``.
        axis: Axis of the neurons.
        select: Key or index of the tensor, where the layer gives several.
        mask: See :class:`~lightning_otrt.layers.pairs.LayerPair`.

    Raises:
        ValueError: If it is not known which elements of a mask are padding, or the mask that the user named is none of
            the layer.
    """
    layer = trace.layer(name)
    found = layer.masks if mask in (None, "auto") else named_masks(side, trace, layer, str(mask))
    tensor = trace.tensor(name, select)
    if mask == "auto" and tensor is not None and len(tensor.shape) != 3:
        return LayerMasks(flat=flat_mask(trace, tensor), on_map=_map_mask(trace, tensor))
    if mask is not None and tensor is not None and len(tensor.shape) > 3:
        raise ValueError(
            f"mask={mask!r} cannot be used for the {side} layer {name!r}, a map of shape {tensor.shape}: padding is "
            "left out of sequences (B, T, C) and (B, C, T) alone. Match layers that give those, or pass mask=None to "
            "read it."
        )
    if mask not in (None, "auto") and tensor is not None and _is_flat(tensor, found[0], trace):
        raise ValueError(
            f"mask={mask!r} cannot be used for the {side} layer {name!r} of shape {tensor.shape}: the tokens of all "
            "samples lie along one axis, and padding is left out of sequences (B, T, C) and (B, C, T) alone. Match "
            "layers that give those, or pass mask=None to read it."
        )
    if mask is None or tensor is None or axis is None or len(tensor.shape) != 3:
        return LayerMasks()
    samples, tokens = (tensor.shape[place] for place in (tensor.batch_axis, _position_axis(axis, tensor.batch_axis)))
    masks = choose_masks(found, samples, tokens, trace.prefix_tokens, time_first=tensor.batch_axis == 1)
    if mask == "auto" and axis in (2, -1) and find_token_grid(trace, layer, tensor).size is not None:
        on_grid = masks.used if masks.used is not None and masks.used.padded else None
        return LayerMasks(masks.sources if masks.used is None else (), on_grid=on_grid)
    if masks.used is not None and masks.used.problem:
        raise ValueError(unknown_polarity(masks.used.source, masks.used.problem))
    if mask != "auto" and masks.used is None and found[0].shape is not None:
        raise ValueError(
            f"The mask {found[0].source.argument!r} has the shape {found[0].shape}, but the {side} layer {name!r} has "
            f"{tokens} positions of {samples} samples. Name its own mask, or pass mask=None for this side."
        )
    if mask != "auto" and masks.used is None:
        return replace(masks, absent=found[0])
    if mask == "auto" and not (layer.has_own_mask and not name.endswith(INPUT)):
        return with_unread(masks, trace, layer, samples, tokens, time_first=tensor.batch_axis == 1)
    return masks


def with_unread(
    masks: LayerMasks, trace: Trace, layer: TracedLayer, samples: int, tokens: int, *, time_first: bool
) -> LayerMasks:
    """The masks of a layer with what else may tell its padding, where none of them was found.

    Args:
        masks: What was found.
        trace: Trace of its network.
        layer: The layer.
        samples: Number of its samples.
        tokens: Number of its tokens, a prefix included.
        time_first: Whether it is ``(T, B, C)``.
    """
    if masks.used is None and masks.misfit is None and masks.unread is None:
        shapes = [(samples, tokens), (samples, tokens - trace.prefix_tokens)]
        turned = [shape[::-1] for shape in shapes] if time_first else []
        lengths = (known for known in trace.arguments if holds_lengths(known) and known.shape == (samples,))
        possible = [
            known
            for known in trace.arguments
            if may_mark_padding(known.source.argument) and known.shown_by != "triangle"
        ]
        late = (replace(known.source, true_at="unknown", is_named=False) for known in possible if known.shape is None)
        unread = chain(
            (known for known in possible if known.shape in [*shapes, *turned] and _may_tell(known)),
            lengths,
            _masks_of_rows(trace, samples, tokens),
            (known for known in _shown_padding(trace, layer) if known.shape in shapes),
            (known for known in _shown_padding(trace, layer) if (known.shape, known.longest) == ((samples,), tokens)),
        )
        return replace(masks, unread=next(unread, None), sources=(*masks.sources, *late))
    return masks


def _shown_padding(trace: Trace, layer: TracedLayer) -> Iterator[TracedMask]:
    """Padding that only values show, which may be that of the layer; none of a sequence that has a mask."""
    given = [known for known in trace.arguments if known.shape is not None and is_mask_name(known.source.argument)]
    for known in trace.shown_padding:
        # Flags of the source of a decoder are not those of its own sequence.
        may_belong = known.shown_by in BY_IDS or known.is_of_target == layer.looks_at_memory
        if may_belong and not any(_is_of_one_sequence(known, mask) for mask in given):
            yield known


def _is_of_one_sequence(known: TracedMask, mask: TracedMask) -> bool:
    """Whether a mask that was given is that of a sequence whose padding values show."""
    if known.shape is None or mask.shape is None or known.is_of_target != mask.is_of_target:
        return False
    return mask.shape[1:] == (known.longest,) if holds_lengths(known) else known.shape in (mask.shape, mask.shape[::-1])


def _masks_of_rows(trace: Trace, samples: int, tokens: int) -> Iterator[TracedMask]:
    """Masks ``(B, S, T)`` with padding, whose first two axes are the rows of a layer ``(B * S, T, C)``."""
    for known in trace.arguments:
        if known.shape is None or not known.padded or not is_mask_name(known.source.argument):
            continue
        # One with S = T looks like one that says which token sees which, and has that of its tokens as shape.
        shape = (*known.shape, known.shape[-1]) if known.source.is_pairwise else known.shape
        if len(shape) == 3 and shape[0] * shape[1] == samples and shape[2] == tokens:
            yield replace(known, shape=shape)


def _is_flat(tensor: TracedTensor, mask: TracedMask, trace: Trace) -> bool:
    """Whether a tensor ``(B * T, C)`` has a row for each token of a mask."""
    if len(tensor.shape) != 2 or mask.shape is None:
        return False
    return tensor.shape[0] == math.prod(mask.shape) != trace.batch_size


def flat_mask(trace: Trace, tensor: TracedTensor) -> TracedMask | None:
    """The mask of tokens, or frames, of which a tensor ``(B * T, ...)`` has one for each, where some are padding."""
    rows = tensor.shape[0]
    found = (mask for layer in trace.layers for mask in layer.masks if mask.shape is not None and mask.padded)
    return next((mask for mask in found if rows == math.prod(mask.shape or ()) != trace.batch_size), None)


def _map_mask(trace: Trace, tensor: TracedTensor) -> TracedMask | None:
    """The mask, or the lengths, of an input from which a map ``(B, C, F, T)`` may come, where some of it is padding."""
    samples = tensor.shape[0]
    if len(tensor.shape) < 4 or not trace.is_sample_count(samples) or tensor.position_count < 2:
        return None
    entered = [shape for layer in trace.layers if _is_input(layer, trace) for shape in layer.input_shapes]
    shapes = [shape for shape in entered if len(shape) > 2 and shape[0] == samples]
    # A series beside images has a mask of its own.
    images = [shape for shape in shapes if len(shape) > 3] or shapes
    sizes = {size for shape in images for size in shape[1:]}
    for known in trace.arguments:
        if known.shape is None or known.shape[0] != samples:
            continue
        fits = known.longest in {1, *sizes} if holds_lengths(known) else sizes.issuperset(known.shape[1:])
        is_image = len(known.shape) > 2 or known.source.is_pairwise
        padded = known.padded_images if is_image else known.padded
        if fits and (holds_lengths(known) or (padded and is_mask_name(known.source.argument))):
            return known
    return None


def _is_input(layer: TracedLayer, trace: Trace) -> bool:
    """Whether inputs of the model enter a layer."""
    return layer.takes_model_input or layer.name == trace.root


def pair_masks(pair: LayerPair, student: Trace, teacher: Trace) -> tuple[LayerMasks, LayerMasks]:
    """The masks of both layers of a pair."""
    return (
        layer_masks("student", student, pair.student, pair.axes[0], pair.select, pair.masks[0]),
        layer_masks("teacher", teacher, pair.teacher, pair.axes[1], pair.select, pair.masks[1]),
    )


def named_masks(side: str, trace: Trace, layer: TracedLayer, name: str) -> tuple[TracedMask, ...]:
    """What the user named as the mask of a side: an argument of the network, then those of modules around the layer.

    Args:
        side: ``"student"`` or ``"teacher"``, for errors.
        trace: Trace of its network.
        layer: The layer.
        name: Name of the argument; with ``~`` in front its true elements are padding.

    Raises:
        ValueError: If there is no such argument, or it is no mask.
    """
    argument = name.removeprefix("~")
    inner = [_as_named(known) for known in layer.masks if known.source.module != trace.root]
    inner = [known for known in inner if known.source.argument == argument]
    is_inside = any(known.shape is not None for known in inner)
    own = [known for known in trace.arguments if known.source.argument == argument]
    # The network may have an argument of that name, too, which was left out.
    found = [*(known for known in own if known.shape is not None or not is_inside), *inner]
    usable = [known for known in found if not known.problem]
    kind = trace.layer(trace.root).kind
    if not found:
        arguments = [known.source.argument for known in trace.arguments]
        around = list(dict.fromkeys(known.source.argument for known in layer.masks if known.shape is not None))
        raise ValueError(
            f"mask={name!r} names no argument of the {side} ({kind}). Its forward takes {arguments}"
            f"{f', and the modules around {layer.name!r} get {around}' if around else ''}. Pass a tuple (student, "
            "teacher) where the two differ."
        )
    if not usable:
        raise ValueError(f"mask={name!r} of the {side} ({kind}): {found[0].problem}.")
    if not name.startswith("~"):
        return tuple(usable)
    return tuple(replace(known, source=replace(known.source, true_at="padding")) for known in usable)


def _as_named(mask: TracedMask) -> TracedMask:
    """A mask of an inner module where the user names it, and so says what it means: nothing is doubtful then."""
    source = replace(mask.source, true_at="valid", is_named=True, is_turned=False)
    return replace(mask, source=source, problem="", empty=0, is_doubtful=False)


def _may_tell(mask: TracedMask) -> bool:
    """Whether a mask may show padding. A mask (T, T) that is equal for all samples, as a causal one, cannot."""
    return mask.padded > 0 or not mask.source.is_pairwise


def _position_axis(neuron_axis: int, batch_axis: int) -> int:
    """The axis of the positions of a tensor with three axes."""
    return ({0, 1, 2} - {batch_axis, neuron_axis % 3}).pop()
