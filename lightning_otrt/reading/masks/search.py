"""Chooses the padding masks of a layer: which masks around it belong to its sequence, in a walk outwards over modules.

Each module's arguments are taken by name, which tells what their true elements are. A mask that the network made
itself, and that would then leave no token of any sample, or show each token all later ones, is read the other way
round.

A mask belongs to a layer if nothing between the two starts another sequence: a decoder has its own, a vision tower has
none of the text beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import OF_TARGET, MaskSource, TracedMask
from lightning_otrt.reading.masks.meaning import means_the_opposite
from lightning_otrt.reading.masks.names import (
    LABELS,
    is_mask_name,
    late_names,
    may_mark_padding,
    memory_names,
    own_names,
)
from lightning_otrt.reading.masks.padding_shapes import is_triangle, padded_images
from lightning_otrt.reading.masks.values import as_rows, count_frames, is_pairwise, problem_of, valid_tokens
from lightning_otrt.reading.traced.calls import ModuleCall, argument_names, is_ids, is_tensor

__all__ = ["MaskSearch", "holds_lengths"]

_UNKNOWN_PADDING = "each token is seen by another or by itself, but not by the same ones in each sample"


class MaskSearch:
    """Finds the masks of the layers of one traced forward.

    Args:
        inputs: The tensors that entered the whole model.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = {id(tensor) for tensor in inputs}
        # By id, the outputs of single layers that got a memory: a sequence that a decoder looks at. The tensors
        # are kept so that their ids are not used again.
        self._of_memory: dict[int, Tensor] = {}
        # The same of sequences that stand beside the first one of a module around, with the names of such modules.
        self._of_others: dict[int, tuple[Tensor, frozenset[str]]] = {}
        self._has_decoded = False
        # The value is kept, so that its id is not used again during the search.
        self._known: dict[tuple[MaskSource, int], tuple[Any, TracedMask]] = {}
        self._turns: dict[tuple[MaskSource, int], tuple[Any, bool]] = {}

    def masks(self, calls: Sequence[ModuleCall]) -> tuple[TracedMask, ...]:
        """The masks of the sequence of a layer.

        Args:
            calls: The layer and the modules around it that are running, innermost first.
        """
        found: list[TracedMask] = []
        pairwise: list[TracedMask] = []
        is_memory = is_other = False
        for place, call in enumerate(calls):
            inner = calls[:place]
            is_memory = is_memory or self._holds_memory(call, inner)
            is_other = is_other or _holds_other(call, inner) or any(call.name in self._others(each) for each in inner)
            if is_memory:
                candidates = memory_names(call, inner)
            else:
                candidates = own_names(call, inner, is_after_decoder=self._has_decoded)
            if place == len(calls) - 1:
                candidates |= late_names(call, inner, is_memory=is_memory)
            has_two = is_memory or is_other or any(each.memories for each in (call, *inner))
            unknown: Sequence[str] = () if has_two else tuple(call.arguments)
            candidates |= {name: "unknown" for name in unknown if call is not calls[-1] and may_mark_padding(name)}
            for name, true_at in candidates.items():
                source = MaskSource(call.name, name, true_at, call.method)
                mask = self._traced(call, self._turned(call.arguments.get(name), source, calls[-1]))
                if mask is None or (true_at == "unknown" and mask.shape is None):
                    continue
                if not (is_memory or all(self._continues(each, call, name) for each in inner)):
                    continue
                mask = replace(mask, is_doubtful=is_other and not is_memory and mask.shape is not None)
                (pairwise if mask.source.is_pairwise else found).append(mask)
        self._has_decoded |= calls[0].looks_at_memory
        # Masks (T, T) are less certain: some libraries let padding see itself, or everything.
        return (*found, *pairwise)

    def pass_on(self, call: ModuleCall, outputs: Sequence[Tensor], calls: Sequence[ModuleCall]) -> None:
        """Note that what a single layer made of a memory is one too.

        Args:
            call: The layer, which has ended.
            outputs: What it returned.
            calls: The modules around it, innermost first.
        """
        start = call.sequence
        if start is None or start.dim() != 3 or call.memories:
            return
        beside = {outer.name for outer in calls if any(start is other for other in _other_sequences(outer))}
        names = self._others(call) | beside
        if names:
            same = (value for value in outputs if value.shape[:-1] == start.shape[:-1])
            self._of_others.update({id(value): (value, names) for value in same})
        if id(start) in self._of_memory or any(start is memory for outer in calls for memory in outer.memories):
            self._of_memory.update({id(value): value for value in outputs if value.shape[:-1] == start.shape[:-1]})

    def _others(self, call: ModuleCall) -> frozenset[str]:
        """Names of the modules around beside whose first sequence stands what a call starts with."""
        return self._of_others.get(id(call.sequence), (None, frozenset[str]()))[1]

    def _holds_memory(self, call: ModuleCall, inner: Sequence[ModuleCall]) -> bool:
        """Whether one of the inner calls starts with the sequence that the call looks at."""
        if not call.memories:
            return False
        starts = [each.sequence for each in inner if not each.memories]
        return any(
            start is memory or id(start) in self._of_memory
            for start in starts
            if start is not None
            for memory in call.memories
        )

    def named(self, root: ModuleCall) -> tuple[TracedMask, ...]:
        """What the user may name as mask: the arguments of the root's forward."""
        found = []
        for name in argument_names(root):
            source = MaskSource(root.name, name, "valid", root.method, is_named=True)
            value = root.arguments.get(name)
            traced = self._traced(root, source) or _no_mask(value, source)
            if isinstance(value, Tensor) and value.dim() == 2 and not value.is_nested and is_mask_name(name):
                traced = replace(traced, padded=_uneven(value))
                if may_mark_padding(name) and is_triangle(value):  # as many samples as tokens
                    traced = replace(traced, shown_by="triangle")
            if isinstance(value, Tensor) and not value.is_nested and is_mask_name(name):
                pixels = value.squeeze(1) if value.dim() == 4 and value.shape[1] == 1 else value
                traced = replace(traced, padded_images=padded_images(pixels) if pixels.dim() == 3 else 0)
            found.append(traced)
        return tuple(found)

    def _traced(self, call: ModuleCall, source: MaskSource) -> TracedMask | None:
        """The mask of that name; None if the argument of that name is no mask."""
        value = call.arguments.get(source.argument)
        key = source, id(value)
        if key not in self._known:
            traced = TracedMask(source, None) if value is None else _look_at(value, call.module, source)
            if traced is None:
                return None
            self._known[key] = value, traced
        return self._known[key][1]

    def _turned(self, value: Any, source: MaskSource, root: ModuleCall) -> MaskSource:
        """The source, read the other way round where the network made a mask that by its name makes no sense.

        Some modules call a mask ``attention_mask`` that is true at padding. Without padding it is false everywhere, or
        true at all later tokens and not at each token itself.
        One that the user passed is read by its name, and so is one that may come from an empty mask of the user.
        """
        key = source, id(value)
        if id(value) in self._inputs:
            return source
        if key not in self._turns:  # each layer asks for those around it
            turned = means_the_opposite(value, source, root)
            self._turns[key] = value, turned
        if not self._turns[key][1]:
            return source
        return replace(source, true_at="padding" if source.true_at == "valid" else "valid", is_turned=True)

    def _continues(self, inner: ModuleCall, outer: ModuleCall, name: str) -> bool:
        """Whether a call does not start a sequence other than that of the outer call's mask ``name``."""
        start = inner.sequence
        if start is None:
            return True
        value = outer.arguments.get(name)
        if _is_image(start, value):
            return False
        if not (id(start) in self._inputs or is_ids(start)):
            return True
        if name == LABELS:  # the decoder's ids are made from them inside
            holds_both = any(key.startswith(OF_TARGET) for key in argument_names(inner))
            return value is None or holds_both or not is_ids(start) or start.shape == value.shape
        mask = as_rows(value, MaskSource(outer.name, name, "valid", is_pairwise=is_pairwise(value)))
        of_target = name.startswith(OF_TARGET)
        own = [
            value
            for key, value in outer.arguments.items()
            if is_tensor(value) and "mask" not in key and _may_belong(value, mask)
            if key.startswith(OF_TARGET) == of_target or not (of_target or outer.has_two_sequences)
        ]
        if not own:  # inside of a container that is no mapping, or not given by name
            return _may_belong(start, mask)
        return _is_same(start, own[0])


def _is_image(start: Tensor, mask: Any) -> bool:
    """Whether a call starts with images ``(B, C, H, W)``, and so with no sequence of a mask ``(B, T)`` beside them."""
    is_frames = is_tensor(mask) and mask.dim() == 2 and mask.shape[1] in start.shape[1:]
    return start.dim() == 4 and start.is_floating_point() and start.shape[1] == 3 and not is_frames


def holds_lengths(mask: TracedMask) -> bool:
    """Whether an argument holds the lengths of the samples: ``(B,)``, by its name."""
    return mask.shape is not None and len(mask.shape) == 1


def _no_mask(value: Any, source: MaskSource) -> TracedMask:
    lengths = _lengths(value)
    if lengths is not None and _may_be_lengths(source.argument):
        problem = "it holds lengths and is no mask (B, T)"
        return TracedMask(source, tuple(lengths.shape), problem=problem, longest=int(lengths.max()))
    if isinstance(value, Tensor) and value.dim() == 3 and is_mask_name(source.argument):  # pixels (B, H, W)
        return TracedMask(source, tuple(value.shape), problem="it is no mask (B, T)", padded=_uneven(value))
    return TracedMask(source, None, problem="it is no mask (B, T)")


def _lengths(value: Any) -> Tensor | None:
    """Whole numbers, one for each sample, or shares of the longest one, which has 1."""
    if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        return torch.tensor(value)
    if not isinstance(value, Tensor) or value.dim() != 1 or not value.numel() or value.dtype == torch.bool:
        return None
    if value.is_floating_point():
        return value if bool((value > 0).all() & (value.max() == 1)) else None
    return None if value.is_complex() else value


def _may_be_lengths(name: str) -> bool:
    """Whether an argument is called as one of lengths: ``lengths``, ``x_lens``, ``seqlens``, ``num_frames``."""
    words = name.lower().split("_")
    is_count = (
        len(words) > 1 and words[0] in ("n", "nb", "num") and words[-1] in ("frames", "points", "steps", "tokens")
    )
    return is_count or any(word.endswith(("length", "lengths", "len", "lens")) for word in words)


def _uneven(mask: Tensor) -> int:
    """In how many samples some elements of a mask are others than the rest."""
    flat = mask.flatten(1)
    return _count((flat != flat[:, :1]).any(1))


def _holds_other(call: ModuleCall, inner: Sequence[ModuleCall]) -> bool:
    """Whether the inner calls start with another sequence of the call than its first; nothing else is known of it."""
    starts = [each.sequence for each in inner]
    return any(start is other for start in starts for other in _other_sequences(call))


def _other_sequences(call: ModuleCall) -> list[Tensor]:
    """The sequences ``(B, T, C)`` that a call gets beside its first one, of ids or of vectors."""
    own = call.sequence
    if own is None or not (own.dim() == 3 or is_ids(own)):
        return []
    return [
        value
        for name, value in call.arguments.items()
        if is_tensor(value) and value is not own and value.dim() == 3 and value.is_floating_point()
        if "mask" not in name and "position" not in name and "pos" not in name.split("_") and len(value) == len(own)
    ]


def _look_at(value: Any, module: nn.Module, source: MaskSource) -> TracedMask | None:
    source = replace(source, is_pairwise=source.true_at in ("valid", "unknown") and is_pairwise(value))
    mask = as_rows(value, source)
    if mask is None or mask.is_complex():
        return None
    frames = count_frames(module, mask.shape[1])
    traced = TracedMask(source, tuple(mask.shape), frames, problem_of(mask, source))
    # One for all samples says nothing about padding, such as a causal one. Those of later batches may.
    is_common = source.is_pairwise and _is_common(value)
    if source.is_pairwise and (source.is_named or source.true_at == "unknown"):
        return replace(traced, padded=0 if is_common else len(value))
    if traced.problem or source.is_named:
        return traced
    valid = valid_tokens(mask, source)
    padded = _count((~valid).any(1))
    if source.is_pairwise and not padded:
        return TracedMask(source, None) if is_common else replace(traced, problem=_UNKNOWN_PADDING)
    if _is_causal(valid, mask) and not source.is_pairwise and source.true_at != "label":
        return None
    return replace(traced, empty=_count(valid.sum(1) == 0), padded=padded)


def _is_common(value: Tensor) -> bool:
    """Whether all samples have the same mask. It waits for the device, in the traced forward only."""
    return torch.equal(value, value[:1].expand_as(value))


def _count(samples: Tensor) -> int:
    """How many of the samples it is true for. It waits for the device, in the traced forward only."""
    return int(samples.sum())


def _is_causal(valid: Tensor, mask: Tensor) -> bool:
    """Whether it is a causal mask ``(T, T)``, which says nothing about padding."""
    if valid.shape[0] != valid.shape[1] or len(valid) < 2:
        return False
    triangle = torch.ones_like(valid).tril()
    # Booleans in a triangle may also be the padding mask of sequences of 1 to T tokens.
    shapes = [~triangle, ~triangle.T, *([triangle] if mask.is_floating_point() else [])]
    return any(torch.equal(valid, shape) for shape in shapes)


def _may_belong(tensor: Tensor, mask: Tensor | None) -> bool:
    """Whether a tensor may be the sequence of a mask ``(B, T)``: ``(B, T, ...)``, ``(T, B, ...)`` or ``(B, C, T)``."""
    if tensor.dim() not in (2, 3):
        return False
    if mask is None:
        return True
    samples, tokens = mask.shape
    shape = tuple(tensor.shape)
    return (shape[0] == samples and tokens in shape[1:]) or shape[:2] == (tokens, samples)


def _is_same(start: Tensor, sequence: Tensor) -> bool:
    """Whether two tensors are one sequence: one tensor, or ids that agree in most places, as with masked words."""
    if start is sequence:
        return True
    if not (is_ids(start) and is_ids(sequence)) or start.shape != sequence.shape:
        return False
    return bool((start == sequence).float().mean() >= 0.5)
