"""Chooses the padding masks of a layer: which masks around it belong to its sequence, in a walk outwards over modules.

Each module's arguments are taken by name. A mask belongs to a layer if nothing between the two starts another sequence:
a decoder has its own, a vision tower has none of the text beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import MaskSource, TracedMask
from lightning_otrt.reading.masks import as_rows, count_frames, is_pairwise, problem_of, valid_tokens

__all__ = ["Call", "MaskSearch", "argument_names", "holds_lengths", "may_mark_padding"]

_ENCODER = {
    "attention_mask": "valid",
    "valid_mask": "valid",
    "src_key_padding_mask": "padding",
    "src_padding_mask": "padding",
    "key_padding_mask": "padding",
    "self_attn_padding_mask": "padding",
    "padding_mask": "padding",
    "encoder_padding_mask": "padding",
}
_DECODER = {
    "decoder_attention_mask": "valid",
    "tgt_key_padding_mask": "padding",
    "tgt_padding_mask": "padding",
    "decoder_padding_mask": "padding",
}
#: Masks of the sequence that a decoder attends to.
_OF_MEMORY = ("src_key_padding_mask", "src_padding_mask", "encoder_padding_mask")
#: The same, and other names of them.
_MEMORY_MASKS = {
    "encoder_attention_mask": "valid",
    "memory_key_padding_mask": "padding",
    **dict.fromkeys(_OF_MEMORY, "padding"),
}
#: Names that a module of cross-attention gives to the mask of its keys.
_KEY_MASKS = {"attention_mask": "valid", "key_padding_mask": "padding"}
#: What a decoder, or a layer of one, gets besides its own sequence.
_MEMORY = ("encoder_hidden_states", "encoder_out", "memory", "key_value_states", "cross_attention_states")
#: The same, where the first tensor is another one: latent vectors that look at inputs.
_MEMORY_OF_LATENTS = ("inputs", "context")
_UNKNOWN_PADDING = "each token is seen by another or by itself, but not by the same ones in each sample"
_OF_TARGET = ("decoder", "tgt", "target")


#: Words in the names of masks that mark no padding of the network's own sequence.
_OTHER_MASKS = {"cross", "encoder", "global", "head", "inputs", "label", "labels", "loss", "memory", "special"}


@dataclass(frozen=True)
class Call:
    """A module that is running.

    Args:
        name: Its name.
        module: The module.
        arguments: Its arguments by name, in the order of its signature.
        method: The method that was called.
    """

    name: str
    module: nn.Module
    arguments: Mapping[str, Any]
    method: str = "forward"

    @property
    def sequence(self) -> Tensor | None:
        """Its first tensor that is no mask."""
        return next((value for name, value in self.arguments.items() if _is_tensor(value) and "mask" not in name), None)

    @property
    def looks_at_memory(self) -> bool:
        """Whether it is a decoder or a part of one, which gets another sequence too."""
        names = [name for name in _MEMORY if self.arguments.get(name) is not None]
        names += [name for name in _MEMORY_OF_LATENTS if _is_tensor(self.arguments.get(name))]
        return any(self.arguments[name] is not self.sequence for name in names)

    @property
    def memories(self) -> tuple[Tensor, ...]:
        """The sequences that its own one looks at."""
        names = [*_MEMORY, *_MEMORY_OF_LATENTS, *(("key", "value") if self.is_cross_attention else ())]
        found: list[Any] = [self.arguments.get(name) for name in names]
        return tuple(value for value in found if _is_tensor(value) and value is not self.sequence)

    @property
    def is_cross_attention(self) -> bool:
        """Whether its mask is that of the keys, and these are no queries."""
        query, key = self.arguments.get("query"), self.arguments.get("key")
        is_named = "cross" in self.name.rpartition(".")[2].lower() or "Cross" in type(self.module).__name__
        has_other_keys = key is not None and query is not None and key is not query
        return is_named or has_other_keys or self.arguments.get("key_value_states") is not None

    @property
    def has_two_sequences(self) -> bool:
        """Whether it gets the sequences of an encoder and of a decoder."""
        return any(name.startswith(_OF_TARGET) for name in self.arguments) and not self.looks_at_memory


class MaskSearch:
    """Finds the masks of the layers of one traced forward.

    Args:
        inputs: The tensors that entered the whole model.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = {id(tensor) for tensor in inputs}
        # What single layers made of sequences that others look at; the tensors are kept, as their ids are.
        self._of_memory: dict[int, Tensor] = {}
        # The value is kept, so that its id is not used again during the search.
        self._known: dict[tuple[MaskSource, int], tuple[Any, TracedMask]] = {}

    def masks(self, calls: Sequence[Call]) -> tuple[TracedMask, ...]:
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
            is_other = is_other or _holds_other(call, inner)
            candidates = _memory_candidates(call, inner) if is_memory else _candidates(call, inner)
            if place == len(calls) - 1 and _takes_any(call):
                late = _DECODER if not is_memory and _is_in_decoder(inner) else _ENCODER
                is_late_known = not (call.is_cross_attention or call.looks_at_memory)
                candidates |= {name: late[name] for name in late if is_late_known and name not in argument_names(call)}
            has_two = is_memory or is_other or any(each.memories for each in (call, *inner))
            unknown: Sequence[str] = () if has_two else tuple(call.arguments)
            candidates |= {name: "unknown" for name in unknown if call is not calls[-1] and may_mark_padding(name)}
            for name, true_at in candidates.items():
                mask = self._traced(call, MaskSource(call.name, name, true_at, call.method))
                if mask is None or (true_at == "unknown" and mask.shape is None):
                    continue
                if not (is_memory or all(self._continues(each, call, name) for each in inner)):
                    continue
                mask = replace(mask, is_doubtful=is_other and not is_memory and mask.shape is not None)
                (pairwise if mask.source.is_pairwise else found).append(mask)
        # Last: tokens may see themselves although they are padding, and libraries let padding see everything.
        return (*found, *pairwise)

    def pass_on(self, call: Call, outputs: Sequence[Tensor], calls: Sequence[Call]) -> None:
        """Note that what a single layer made of a memory is one too.

        Args:
            call: The layer, which has ended.
            outputs: What it returned.
            calls: The modules around it, innermost first.
        """
        start = call.sequence
        if start is None or start.dim() != 3 or call.memories:
            return
        if id(start) in self._of_memory or any(start is memory for outer in calls for memory in outer.memories):
            self._of_memory.update({id(value): value for value in outputs if value.shape[:-1] == start.shape[:-1]})

    def _holds_memory(self, call: Call, inner: Sequence[Call]) -> bool:
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

    def named(self, root: Call) -> tuple[TracedMask, ...]:
        """What the user may name as mask: the arguments of the root's forward."""
        found = []
        for name in argument_names(root):
            source = MaskSource(root.name, name, "valid", root.method, is_named=True)
            found.append(self._traced(root, source) or _no_mask(root.arguments.get(name), source))
        return tuple(found)

    def _traced(self, call: Call, source: MaskSource) -> TracedMask | None:
        """The mask of that name; None if the argument of that name is no mask."""
        value = call.arguments.get(source.argument)
        key = source, id(value)
        if key not in self._known:
            traced = TracedMask(source, None) if value is None else _look_at(value, call.module, source)
            if traced is None:
                return None
            self._known[key] = value, traced
        return self._known[key][1]

    def _continues(self, inner: Call, outer: Call, name: str) -> bool:
        """Whether a call does not start a sequence other than that of the outer call's mask ``name``."""
        start = inner.sequence
        if start is None or not (id(start) in self._inputs or _is_ids(start)):
            return True
        value = outer.arguments.get(name)
        mask = as_rows(value, MaskSource(outer.name, name, "valid", is_pairwise=is_pairwise(value)))
        of_target = name.startswith(_OF_TARGET)
        own = [
            value
            for key, value in outer.arguments.items()
            if _is_tensor(value) and "mask" not in key and _may_belong(value, mask)
            if key.startswith(_OF_TARGET) == of_target or not outer.has_two_sequences
        ]
        if not own:  # inside of a container that is no mapping, or not given by name
            return _may_belong(start, mask)
        return _is_same(start, own[0])


def may_mark_padding(name: str) -> bool:
    """Whether an argument may be a padding mask by its name, of which it is not known what its true elements are.

    Example:
        >>> may_mark_padding("src_mask"), may_mark_padding("attention_mask"), may_mark_padding("head_mask")
        (True, False, False)
    """
    *words, last = name.split("_")
    is_known = name in _ENCODER or name in _DECODER
    return last in ("mask", "masks", "valid") and not is_known and _OTHER_MASKS.isdisjoint(words)


def holds_lengths(mask: TracedMask) -> bool:
    """Whether an argument holds the lengths of the samples: ``(B,)``, by its name."""
    return mask.shape is not None and len(mask.shape) == 1


def _no_mask(value: Any, source: MaskSource) -> TracedMask:
    is_whole = isinstance(value, Tensor) and value.dim() == 1 and not value.is_floating_point()
    words = {"length", "lengths", "len", "lens"}
    if is_whole and not words.isdisjoint(source.argument.split("_")):
        return TracedMask(source, tuple(value.shape), problem="it holds lengths and is no mask (B, T)")
    return TracedMask(source, None, problem="it is no mask (B, T)")


def argument_names(call: Call) -> tuple[str, ...]:
    """The arguments that a forward got or could have got."""
    return tuple(dict.fromkeys((*_signature(getattr(type(call.module), call.method, None)), *call.arguments)))


@lru_cache(maxsize=4096)
def _signature(forward: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return ()
    several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return tuple(parameter.name for parameter in parameters[1:] if parameter.kind not in several)


def _candidates(call: Call, inner: Sequence[Call]) -> dict[str, str]:
    """Names of the call's arguments that may be masks of a layer inside of these inner calls, and what true means."""
    names = set(argument_names(call))
    encoder = {name: true_at for name, true_at in _ENCODER.items() if name in names}
    decoder = {name: true_at for name, true_at in _DECODER.items() if name in names}
    if call.looks_at_memory:
        encoder = {name: true_at for name, true_at in encoder.items() if name not in _OF_MEMORY}
        encoder = {} if call.is_cross_attention and names.isdisjoint(_MEMORY_MASKS) else encoder
        return {**decoder, **encoder}
    if call.is_cross_attention:
        return {}
    if any(layer.looks_at_memory for layer in inner):
        return decoder
    if call.has_two_sequences or decoder:
        inside = " ".join(f"{layer.name.rpartition('.')[2]} {type(layer.module).__name__}" for layer in inner).lower()
        if "decoder" in inside:
            return decoder
        return encoder if "encoder" in inside else {**encoder, **decoder}
    return encoder


def _memory_candidates(call: Call, inner: Sequence[Call]) -> dict[str, str]:
    """The same for a layer that holds the sequence which a decoder or latent vectors look at."""
    names = set(argument_names(call))
    if call.is_cross_attention:
        known = _KEY_MASKS if names.isdisjoint(_MEMORY_MASKS) else _MEMORY_MASKS
        return {name: true_at for name, true_at in known.items() if name in names}
    if call.looks_at_memory:
        return {name: true_at for name, true_at in _MEMORY_MASKS.items() if name in names}
    if any(layer.sequence is not None and layer.sequence is call.sequence for layer in inner if layer.memories):
        return {}  # a decoder's own sequence, around the layers that get the other one
    return {name: true_at for name, true_at in _ENCODER.items() if name in names}


def _is_in_decoder(inner: Sequence[Call]) -> bool:
    names = " ".join(f"{layer.name.rpartition('.')[2]} {type(layer.module).__name__}" for layer in inner).lower()
    return "decoder" in names or any(layer.looks_at_memory for layer in inner)


def _holds_other(call: Call, inner: Sequence[Call]) -> bool:
    """Whether the inner calls start with another sequence of the call than its first; nothing else is known of it."""
    own = call.sequence
    if own is None or own.dim() != 3 or not inner:
        return False
    others = [
        value
        for name, value in call.arguments.items()
        if _is_tensor(value) and value is not own and value.dim() == 3 and value.is_floating_point()
        if "mask" not in name and "position" not in name and "pos" not in name.split("_") and len(value) == len(own)
    ]
    starts = [each.sequence for each in inner]
    return any(start is other for start in starts for other in others)


def _takes_any(call: Call) -> bool:
    """Whether a later batch may have arguments that neither the signature nor this call shows."""
    try:
        parameters = inspect.signature(getattr(call.module, call.method)).parameters.values()
    except (TypeError, ValueError, AttributeError):
        return False
    names = {parameter.name for parameter in parameters}
    is_mapping = len(names) == 1 and isinstance(call.arguments.get(next(iter(names))), Mapping)
    return is_mapping or any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _look_at(value: Any, module: nn.Module, source: MaskSource) -> TracedMask | None:
    source = replace(source, is_pairwise=source.true_at == "valid" and not source.is_named and is_pairwise(value))
    mask = as_rows(value, source)
    if mask is None or mask.is_complex():
        return None
    frames = count_frames(module, mask.shape[1])
    traced = TracedMask(source, tuple(mask.shape), frames, problem_of(mask, source))
    if traced.problem or source.is_named:
        return traced
    valid = valid_tokens(mask, source)
    padded = _count((~valid).any(1))
    if source.is_pairwise and not padded:
        # One for all samples says nothing about padding, such as a causal one. Those of later batches may.
        is_common = torch.equal(value, value[:1].expand_as(value))
        return TracedMask(source, None) if is_common else replace(traced, problem=_UNKNOWN_PADDING)
    if _is_causal(valid, mask) and not source.is_pairwise:
        return None
    return replace(traced, empty=_count(valid.sum(1) == 0), padded=padded)


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


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_nested


def _is_ids(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool


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
    if not (_is_ids(start) and _is_ids(sequence)) or start.shape != sequence.shape:
        return False
    return bool((start == sequence).float().mean() >= 0.5)
