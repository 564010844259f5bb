"""The padding masks of a layer that is recorded, and the warnings where padding is not left out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_otrt.layers.mask_sources import LayerMasks, TracedMask, choose_masks
from lightning_otrt.layers.pairs import INPUT, LayerPair
from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor
from lightning_otrt.reading.mask_names import may_mark_padding
from lightning_otrt.reading.mask_search import holds_lengths
from lightning_otrt.reading.masks import unknown_polarity
from lightning_otrt.reading.token_grid import find_token_grid

__all__ = ["flat_mask", "layer_masks", "pair_masks", "warn_of_one_sided_masks", "warn_of_unused_masks"]


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
    found = (_named(side, trace, layer, mask),) if mask not in (None, "auto") else layer.masks
    tensor = trace.tensor(name, select)
    if mask == "auto" and tensor is not None and len(tensor.shape) != 3:
        return LayerMasks(flat=flat_mask(trace, tensor))
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
    if mask == "auto" and masks.used is None and masks.misfit is None and masks.unread is None:
        shapes = (samples, tokens), (samples, tokens - trace.prefix_tokens)
        if layer.has_own_mask and not name.endswith(INPUT):
            return masks
        lengths = (known for known in trace.arguments if holds_lengths(known) and known.shape == (samples,))
        possible = [known for known in trace.arguments if may_mark_padding(known.source.argument)]
        late = (replace(known.source, true_at="unknown", is_named=False) for known in possible if known.shape is None)
        return replace(
            masks,
            unread=next(
                (known for known in possible if known.shape in shapes and _may_tell(known)), next(lengths, None)
            ),
            sources=(*masks.sources, *late),
        )
    return masks


def flat_mask(trace: Trace, tensor: TracedTensor) -> TracedMask | None:
    """The mask of tokens, or frames, of which a tensor ``(B * T, ...)`` has one for each, where some are padding."""
    rows = tensor.shape[0]
    found = (mask for layer in trace.layers for mask in layer.masks if mask.shape is not None and mask.padded)
    return next((mask for mask in found if rows == math.prod(mask.shape or ()) != trace.batch_size), None)


def pair_masks(pair: LayerPair, student: Trace, teacher: Trace) -> tuple[LayerMasks, LayerMasks]:
    """The masks of both layers of a pair."""
    return (
        layer_masks("student", student, pair.student, pair.axes[0], pair.select, pair.masks[0]),
        layer_masks("teacher", teacher, pair.teacher, pair.axes[1], pair.select, pair.masks[1]),
    )


def warn_of_unused_masks(side: str, masks: Mapping[str, LayerMasks]) -> None:
    """Warn once where there is a mask, but none that has the length of a layer, or one that leaves no token.

    Args:
        side: ``"student"`` or ``"teacher"``.
        masks: The masks of its layers by name.
    """
    misfits = {name: found.misfit for name, found in masks.items() if found.misfit is not None}
    if misfits:
        mask = next(iter(misfits.values()))
        warnings.warn(
            f"Padding is not left out of the {side} layers {list(misfits)}: the mask {mask.source.argument!r} of "
            f"{mask.source.module or 'the network'!r} with shape {mask.shape} has another length. If another argument "
            "is their mask, name it with LayerPair(mask=...); mask=None says that padding is to be read.",
            stacklevel=2,
        )
    flat = {name: found.flat for name, found in masks.items() if found.flat is not None}
    if flat:
        mask = next(iter(flat.values()))
        warnings.warn(
            f"The tokens of all samples lie along one axis in the {side} layers {list(flat)}, and those that the mask "
            f"{mask.source.argument!r} of shape {mask.shape} leaves out are read too. Flatten valid tokens alone, or "
            "reshape where the loss is computed and return (B, T, C). LayerPair(mask=None) says that this is meant.",
            stacklevel=2,
        )
    on_grid = {name: found.on_grid for name, found in masks.items() if found.on_grid is not None}
    if on_grid:
        mask = next(iter(on_grid.values()))
        warnings.warn(
            f"The mask {mask.source.argument!r} leaves out tokens of the {side} layers {list(on_grid)}, which are the "
            "patches of a map and are pooled like one: their padding is read. Give the network images of one size, "
            "match layers after the tokens are put together, or pass LayerPair(mask=None).",
            stacklevel=2,
        )
    unread = {name: found.unread for name, found in masks.items() if found.unread is not None}
    doubtful = {name: mask for name, mask in unread.items() if mask.is_doubtful}
    seen = {name: mask for name, mask in unread.items() if mask.source.is_pairwise and not mask.source.is_named}
    pairwise = {name: mask for name, mask in seen.items() if mask.source.true_at != "unknown" and name not in doubtful}
    lengths = {name: mask for name, mask in unread.items() if holds_lengths(mask)}
    unread = {name: mask for name, mask in unread.items() if name not in {*pairwise, *doubtful, *lengths}}
    if lengths:
        source = next(iter(lengths.values())).source
        warnings.warn(
            f"The argument {source.argument!r} of the {side} may say how many positions of the layers {list(lengths)} "
            "are no padding, which is read. Give the network a mask (B, T) too and name it with LayerPair(mask=...), "
            "or pass mask=None.",
            stacklevel=2,
        )
    if doubtful:
        source = next(iter(doubtful.values())).source
        warnings.warn(
            f"The {side} layers {list(doubtful)} get another sequence than the first one of "
            f"{source.module or 'the network'!r}, and it is not known whether the mask {source.argument!r} is that of "
            "theirs. It is not used. LayerPair(mask=...) names their mask; mask=None says that padding is to be read.",
            stacklevel=2,
        )
    if pairwise:
        source = next(iter(pairwise.values())).source
        warnings.warn(
            f"The mask {source.argument!r} of {source.module or 'the network'!r} says which tokens see which, and each "
            f"token of the {side} layers {list(pairwise)} is seen. It does not tell their padding, which is read. "
            "LayerPair(mask=...) names an argument of shape (B, T); mask=None says that there is no padding.",
            stacklevel=2,
        )
    if unread:
        name = next(iter(unread.values())).source.argument
        warnings.warn(
            f"The argument {name!r} of the {side} may be the padding mask of its layers {list(unread)}, but its name "
            f'does not tell whether it marks valid tokens or padding. It is not used: pass LayerPair(mask="{name}") if '
            f'it is true at valid tokens, mask="~{name}" if it is true at padding, or mask=None.',
            stacklevel=2,
        )
    used = [found.used for found in masks.values() if found.used is not None and found.used.empty]
    if used:
        mask = used[0]
        name = mask.source.argument
        other = f"~{name}" if mask.source.true_at == "valid" else name
        hint = f'If that is the wrong way round, pass LayerPair(mask="{other}").'
        if mask.source.true_at == "label":
            hint = "They are read as zeros: leave them out of the batch, or pass LayerPair(mask=None)."
        warnings.warn(
            f"The mask {name!r} of the {side} leaves no token in {mask.empty} samples, read as true at "
            f"{mask.source.true_at}. {hint}",
            stacklevel=2,
        )


def warn_of_one_sided_masks(
    pairs: Sequence[LayerPair], masks: Sequence[tuple[LayerMasks, LayerMasks]], student: Trace, teacher: Trace
) -> None:
    """Warn once where the padding of one layer of a pair is left out, and that of the other is read.

    Args:
        pairs: The pairs.
        masks: Their masks, of student and teacher.
        student: Trace of the student.
        teacher: Trace of the teacher.
    """
    sides: dict[str, list[str]] = {}
    for pair, found in zip(pairs, masks, strict=True):
        for place, side, layer, trace in ((0, "student", pair.student, student), (1, "teacher", pair.teacher, teacher)):
            own, other, tensor = found[place], found[1 - place], trace.tensor(layer, pair.select)
            is_sequence = tensor is not None and len(tensor.shape) == 3
            if other.used and is_sequence and not own.used and not own.misfit and pair.masks[place] is not None:
                sides.setdefault(side, []).append(layer)
    for side, layers in sides.items():
        warnings.warn(
            f"Padding is left out on one side only: no mask was found for the {side} layers {layers}, so that their "
            "neurons are averaged over other tokens than those of the layers that they are matched to. Pass the mask "
            "to that network too (`teacher_inputs`), name it with LayerPair(mask=...), or pass mask=None.",
            stacklevel=2,
        )


def _named(side: str, trace: Trace, layer: TracedLayer, mask: str | None) -> TracedMask:
    """The argument that the user named as the mask of a side: of the network, or of a module around the layer."""
    name = str(mask)
    arguments = {traced.source.argument: traced for traced in trace.arguments}
    for traced in layer.masks:
        if traced.source.true_at == "unknown":
            source = replace(traced.source, true_at="valid", is_named=True)
            arguments.setdefault(source.argument, replace(traced, source=source))
    found = arguments.get(name.removeprefix("~"))
    kind = trace.layer(trace.root).kind
    if found is None:
        raise ValueError(
            f"mask={name!r} names no argument of the {side} ({kind}). Its forward takes {list(arguments)}. Pass a "
            "tuple (student, teacher) where the two differ."
        )
    if found.problem:
        raise ValueError(f"mask={name!r} of the {side} ({kind}): {found.problem}.")
    return replace(found, source=replace(found.source, true_at="padding")) if name.startswith("~") else found


def _may_tell(mask: TracedMask) -> bool:
    """Whether a mask may tell padding: one that says the same of each sample which token sees which does not."""
    return mask.padded > 0 or not mask.source.is_pairwise


def _position_axis(neuron_axis: int, batch_axis: int) -> int:
    """The axis of the positions of a tensor with three axes."""
    return ({0, 1, 2} - {batch_axis, neuron_axis % 3}).pop()
