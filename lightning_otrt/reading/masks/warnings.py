"""Warnings of layers whose padding is read, or whose mask leaves no token. ``layer_masks.py`` finds the masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lightning_otrt.layers.mask_sources import LayerMasks, TracedMask
from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.layers.trace import Trace
from lightning_otrt.notices import warn
from lightning_otrt.reading.masks.search import holds_lengths

__all__ = ["warn_of_one_sided_masks", "warn_of_unused_masks"]

#: What is wrong with the masks of some layers of a side, and what to do. ``mask`` is the argument of the first of them.
_WARNINGS = {
    "misfit": (
        "Padding is not left out of the {side} layers {layers}: the mask {mask!r} of {module!r} with shape {shape} has "
        "another length. If another argument is their mask, name it with LayerPair(mask=...); mask=None says that "
        "padding is to be read."
    ),
    "flat": (
        "The tokens of all samples lie along one axis in the {side} layers {layers}, and those that the mask {mask!r} "
        "of shape {shape} leaves out are read too. Flatten valid tokens alone, or reshape where the loss is computed "
        "and return (B, T, C). LayerPair(mask=None) says that this is meant."
    ),
    "on_grid": (
        "The mask {mask!r} leaves out tokens of the {side} layers {layers}, which are the patches of a map and are "
        "pooled like one: their padding is read. Give the network images of one size, match layers after the tokens "
        "are put together, or pass LayerPair(mask=None)."
    ),
    "on_map": (
        "The argument {mask!r} of the {side} marks padding in its input. The layers {layers} are maps, which are read "
        "whole, with the padding. Match layers that give sequences (B, T, C) or (B, C, T), or give the network samples "
        "of one size. LayerPair(mask=None) says that this is meant."
    ),
    "lengths": (
        "The argument {mask!r} of the {side} may give the number of valid positions of the layers {layers}. It is not "
        "used, so that padding is read. Give the network a mask (B, T) too and name it with LayerPair(mask=...), or "
        "pass mask=None."
    ),
    "rows": (
        "The mask {mask!r} of the {side} has the shape {shape}, and its layers {layers} have one row for each place of "
        "the first two axes. It is not used, so that their padding is read. Pass the module that gets the rows a mask "
        "of them too, as encoder(rows, attention_mask={mask}.flatten(0, 1)), or pass LayerPair(mask=None)."
    ),
    "ids": (
        "The embedding {module!r} of the {side} gets its padding_idx at {place} of some samples, and no mask was found "
        "for the layers {layers}: their padding is read. Give the network a mask (B, T), such as `ids != padding_idx`, "
        "as an argument and name it with LayerPair(mask=...); mask=None says that padding is to be read."
    ),
    "pad_token": (
        "The argument {mask!r} of {module!r} in the {side} holds the pad_token_id of its configuration at {place} of "
        "some samples, and no mask was found for the layers {layers}: their padding is read. Give the network a mask "
        "(B, T), such as `ids != pad_token_id`, as an argument and name it with LayerPair(mask=...); mask=None says "
        "that padding is to be read."
    ),
    "labels": (
        "The argument {mask!r} of the {side} has no labels at an end of some samples, where the ids are all the same, "
        "as padding is, and no mask was found for the layers {layers}: their padding is read. Give the network a mask "
        "(B, T) as an argument and name it with LayerPair(mask=...); mask=None says that padding is to be read."
    ),
    "inside": (
        "The argument {mask!r} of the {side} may be the padding mask of its layers {layers}, whose padding is read: "
        "masks are not looked for in lists and tuples. Give the network the mask as an argument of its own and name it "
        "with LayerPair(mask=...), or pass mask=None."
    ),
    "inner": (
        "The argument {mask!r} of {module!r} may be the padding mask of the {side} layers {layers}, but its name does "
        "not tell: their padding is read. Give the whole network a mask (B, T) as an argument and name it with "
        "LayerPair(mask=...), or pass mask=None."
    ),
    "attribute": (
        "The attribute {mask!r} of {module!r} in the {side} may be the padding mask of the layers {layers}, whose "
        "padding is read: masks are taken from arguments alone. Give the whole network a mask (B, T) as an argument "
        "and name it with LayerPair(mask=...), or pass mask=None."
    ),
    "nan": (
        "The argument {mask!r} of the {side} is NaN at {place} of some samples, and no mask was found for the layers "
        "{layers}: their padding is read. Give the network a mask (B, T) as an argument and name it with "
        "LayerPair(mask=...); mask=None says that padding is to be read."
    ),
    "zeros": (
        "The argument {mask!r} of the {side} is 0 at {place} of some samples, as padded series are, and no mask was "
        "found for the layers {layers}: their padding is read. Give the network a mask (B, T) as an argument and name "
        "it with LayerPair(mask=...); mask=None says that this is meant."
    ),
    "doubtful": (
        "The {side} layers {layers} get another sequence than the first one of {module!r}. It is not known whether the "
        "mask {mask!r} belongs to them, so that it is not used. LayerPair(mask=...) names their mask; mask=None says "
        "that padding is to be read."
    ),
    "pairwise": (
        "The mask {mask!r} of {module!r} says which token attends to which. Some token attends to each of the {side} "
        "layers {layers}, so that the mask does not show their padding, which is read. LayerPair(mask=...) names an "
        "argument of shape (B, T); mask=None says that there is no padding."
    ),
    "absent": (
        "LayerPair(mask={mask!r}) names the mask of the {side} layers {layers}, but {module} got None for it in the "
        "first batch. Padding is read until a batch has a mask. Pass it in `forward`, or name another argument."
    ),
    "unknown": (
        "The argument {mask!r} of the {side} may be the padding mask of its layers {layers}, but its name does not "
        'tell whether it marks valid tokens or padding. It is not used: pass LayerPair(mask="{mask}") if it is true at '
        'valid tokens, mask="~{mask}" if it is true at padding, or mask=None.'
    ),
    "empty": (
        "The mask {mask!r} of the {side} leaves no token in {empty} samples, if true means {true_at}. They are read "
        "as zeros: leave them out of the batch, or pass LayerPair(mask=None) to read all of their tokens. If true "
        'means the opposite, pass LayerPair(mask="{other}").'
    ),
    "no_label": (
        "The mask {mask!r} of the {side} leaves no token in {empty} samples, if true means {true_at}. They are read "
        "as zeros: leave them out of the batch, or pass LayerPair(mask=None)."
    ),
}


def warn_of_unused_masks(side: str, masks: Mapping[str, LayerMasks]) -> None:
    """Warn once of each mask of each kind that is there and not used, or that leaves no token of a sample.

    Args:
        side: ``"student"`` or ``"teacher"``.
        masks: The masks of its layers by name.
    """
    # Layers of one kind of problem with one argument, which may have other modules around each of them.
    found: dict[tuple[str, str], dict[str, TracedMask]] = {}
    for layer, known in masks.items():
        for kind, mask in _problems(known):
            found.setdefault((kind, mask.source.argument), {})[layer] = mask
    for (kind, name), layers in found.items():
        mask = next(iter(layers.values()))
        message = _WARNINGS[kind].format(
            side=side,
            layers=list(layers),
            mask=name,
            module=mask.source.module or "the network",
            shape=mask.shape,
            empty=mask.empty,
            place=mask.place,
            true_at=mask.source.true_at,
            other=f"~{name}" if mask.source.true_at == "valid" else name,
        )
        warn(message)


def _problems(masks: LayerMasks) -> Iterator[tuple[str, TracedMask]]:
    """What is wrong with the masks of one layer: keys of :data:`_WARNINGS`, with the mask."""
    if masks.misfit is not None:
        yield "misfit", masks.misfit
    if masks.absent is not None:
        yield "absent", masks.absent
    if masks.flat is not None:
        yield "flat", masks.flat
    if masks.on_map is not None:
        yield "on_map", masks.on_map
    if masks.on_grid is not None:
        yield "on_grid", masks.on_grid
    if masks.used is not None and masks.used.empty:
        yield "no_label" if masks.used.source.true_at == "label" else "empty", masks.used
    if masks.unread is not None:
        yield _why_unread(masks.unread), masks.unread


def _why_unread(mask: TracedMask) -> str:
    source = mask.source
    if mask.shown_by:
        return mask.shown_by
    if holds_lengths(mask):
        return "lengths"
    if mask.shape is not None and len(mask.shape) == 3:
        return "rows"
    if mask.is_doubtful:
        return "doubtful"
    if source.is_pairwise and not source.is_named and source.true_at != "unknown":
        return "pairwise"
    return "unknown"


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
        warn(
            f"Padding is left out on one side only: no mask was found for the {side} layers {layers}, so that their "
            "neurons are averaged over other tokens than those of the layers that they are matched to. Pass the mask "
            "to that network too (`teacher_inputs`), name it with LayerPair(mask=...), or pass mask=None.",
        )
