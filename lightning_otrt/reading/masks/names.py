"""Names of arguments that hold padding masks: which of them belong to a layer, and what their true elements are."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_otrt.layers.mask_sources import OF_TARGET
from lightning_otrt.reading.traced.calls import ModuleCall, argument_names, takes_any

__all__ = [
    "LABELS",
    "is_mask_name",
    "late_names",
    "may_mark_padding",
    "memory_names",
    "names_other_mask",
    "own_names",
]

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
#: Labels of a model that makes the inputs of its decoder from them, by a shift: -100 at positions without one. A
#: position gets the label before its own and predicts its own. So the mask is that of the labels, not of the shifted
#: inputs: these have one position more, which gets the end token, predicts nothing and is trained by no loss.
LABELS = "labels"
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
#: Words in the names of masks that mark no padding of the network's own sequence.
_OTHER_MASKS = {"cross", "encoder", "global", "head", "inputs", "label", "labels", "loss", "memory", "special"}


def own_names(call: ModuleCall, inner: Sequence[ModuleCall], *, is_after_decoder: bool) -> dict[str, str]:
    """Names of the call's arguments that may be masks of a layer inside of these inner calls, and what true means.

    Args:
        call: The call.
        inner: The calls inside of it that are running, innermost first.
        is_after_decoder: Whether a decoder has run before.
    """
    names = set(argument_names(call))
    encoder = {name: true_at for name, true_at in _ENCODER.items() if name in names}
    decoder = {name: true_at for name, true_at in _DECODER.items() if name in names}
    if LABELS in names and any(name.startswith("decoder_") for name in names):
        decoder[LABELS] = "label"  # last: a mask of the decoder's own comes first
    if call.looks_at_memory:
        encoder = {name: true_at for name, true_at in encoder.items() if name not in _OF_MEMORY}
        encoder = {} if call.is_cross_attention and names.isdisjoint(_MEMORY_MASKS) else encoder
        return {**decoder, **encoder}
    if call.is_cross_attention:
        return {}
    if any(layer.looks_at_memory for layer in inner):
        return decoder
    has_inner_decoder = any(name.startswith(OF_TARGET) for layer in inner for name in argument_names(layer))
    if call.has_two_sequences or decoder or has_inner_decoder:
        inside = " ".join(f"{layer.name.rpartition('.')[2]} {type(layer.module).__name__}" for layer in inner).lower()
        if "decoder" in inside:
            return decoder
        if "encoder" in inside:
            return encoder
        return decoder if is_after_decoder else {**encoder, **decoder}
    return encoder


def memory_names(call: ModuleCall, inner: Sequence[ModuleCall]) -> dict[str, str]:
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


def late_names(call: ModuleCall, inner: Sequence[ModuleCall], *, is_memory: bool) -> dict[str, str]:
    """The same for names that neither the signature nor this call shows, but that a later batch may have."""
    if not takes_any(call) or call.is_cross_attention or call.looks_at_memory:
        return {}
    late = _DECODER if not is_memory and _is_in_decoder(inner) else _ENCODER
    return {name: true_at for name, true_at in late.items() if name not in argument_names(call)}


def _is_in_decoder(inner: Sequence[ModuleCall]) -> bool:
    # The last linear layer of a BERT is called decoder, too.
    around = [layer for layer in inner if next(layer.module.children(), None) is not None]
    names = " ".join(f"{layer.name.rpartition('.')[2]} {type(layer.module).__name__}" for layer in around).lower()
    return "decoder" in names or any(layer.looks_at_memory for layer in inner)


def may_mark_padding(name: str) -> bool:
    """Whether an argument may be a padding mask by its name, of which it is not known what its true elements are.

    Example:
        >>> may_mark_padding("src_mask"), may_mark_padding("attention_mask"), may_mark_padding("head_mask")
        (True, False, False)
    """
    is_mask = name.split("_")[-1] in ("mask", "masks", "valid")
    return is_mask and not _is_known(name) and not names_other_mask(name)


def names_other_mask(name: str) -> bool:
    """Whether a word of the name says that it marks something else than padding of the network's own sequence."""
    return not _OTHER_MASKS.isdisjoint(name.split("_"))


def is_mask_name(name: str) -> bool:
    """Whether an argument is called as a padding mask, of known or unknown meaning."""
    return _is_known(name) or may_mark_padding(name)


def _is_known(name: str) -> bool:
    return name in _ENCODER or name in _DECODER
