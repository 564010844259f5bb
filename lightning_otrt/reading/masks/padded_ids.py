"""Padding that the ids of a network show, where it gets no mask of them: for warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional

from lightning_otrt.layers.mask_sources import OF_TARGET, MaskSource, TracedMask
from lightning_otrt.reading.masks.names import is_mask_name
from lightning_otrt.reading.masks.padding_shapes import is_at_ends, place_of
from lightning_otrt.reading.traced.calls import ModuleCall, is_ids, is_tensor

__all__ = ["BY_IDS", "padded_ids", "padded_labels"]

#: What ids show, in :attr:`~lightning_otrt.layers.mask_sources.TracedMask.shown_by`.
BY_IDS = ("ids", "pad_token")
#: Arguments of networks of Hugging Face that hold ids of words.
_IDS = ("input_ids", "decoder_input_ids")


def padded_ids(call: ModuleCall, around: Sequence[ModuleCall] = ()) -> tuple[TracedMask, ...]:
    """What the ids of a call show of padding ``(B, T)``; nothing where none is padded, or it is not certain.

    The id of padding is the ``padding_idx`` of an embedding, or the ``pad_token_id`` in the configuration of a network
    of Hugging Face. It is padding where it stands at the ends of samples alone, in one of them at least twice, and
    more often in some than in others: a token that starts the sequence of each decoder may have the same id. It waits
    for the device, in the traced forward only.

    Args:
        call: The call.
        around: The calls around it, innermost first.

    Example:
        >>> import torch
        >>> embed, ids = nn.Embedding(9, 2, padding_idx=0), torch.tensor([[4, 2, 0], [3, 0, 0], [5, 1, 2]])
        >>> [mask.padded for mask in padded_ids(ModuleCall("embed", embed, {"input": ids}))]
        [2]
    """
    found = []
    for argument, ids, padding in _ids(call):
        is_padding = ids == padding
        if bool(is_at_ends(is_padding) & (is_padding.sum(1) > 1).any()):
            name, kind = ("padding_idx", "ids") if isinstance(call.module, nn.Embedding) else (argument, "pad_token")
            source, padded = MaskSource(call.name, name, "valid", call.method), int(is_padding.any(1).sum())
            of_decoder = _is_of_decoder(ids, (call, *around))
            found.append(
                TracedMask(
                    source,
                    tuple(ids.shape),
                    padded=padded,
                    shown_by=kind,
                    of_decoder=of_decoder,
                    place=place_of(is_padding),
                )
            )
    return tuple(found)


def _ids(call: ModuleCall) -> Iterator[tuple[str, Tensor, int]]:
    """The arguments of a call that hold ids, with their names and the id of padding, where it has one."""
    module = call.module
    if isinstance(module, nn.Embedding):
        padding, names = module.padding_idx, tuple(call.arguments)[:1]
    else:
        padding, names = getattr(getattr(module, "config", None), "pad_token_id", None), _IDS
    if isinstance(padding, int):
        given = ((name, call.arguments[name]) for name in names if name in call.arguments)
        yield from ((name, value, padding) for name, value in given if is_tensor(value) and is_ids(value))


def _is_of_decoder(ids: Tensor, calls: Sequence[ModuleCall]) -> bool:
    """Whether ids are those of a decoder: they are used inside of one, or are an argument of that name."""
    if any(call.looks_at_memory for call in calls):
        return True
    given = calls[-1].arguments
    return any(value is ids or value is ids._base for name, value in given.items() if name.startswith(OF_TARGET))


def padded_labels(call: ModuleCall) -> tuple[TracedMask, ...]:
    """What labels beside ids show of padding ``(B, T)``: they are negative at an end of some samples, as -100 is.

    The ids there have to be all the same in the whole batch. So prompts without labels are no padding, and neither are
    words that are not masked. It waits for the device, in the traced forward only.

    Args:
        call: The call of a network that gets labels, of the shape of its ids.

    Example:
        >>> import torch
        >>> ids, labels = torch.tensor([[4, 2, 0, 0], [3, 5, 6, 7]]), torch.tensor([[4, 2, -100, -100], [3, 5, 6, 7]])
        >>> [mask.padded for mask in padded_labels(ModuleCall("", nn.Identity(), {"input_ids": ids, "labels": labels}))]
        [1]
    """
    ids, found = call.sequence, []
    if ids is None or not is_ids(ids):
        return ()
    for name, value in call.arguments.items():
        is_other = is_tensor(value) and is_ids(value) and value is not ids and not is_mask_name(name)
        padded = _without_label(ids, value < 0) if is_other and value.shape == ids.shape else 0
        if padded:
            source = MaskSource(call.name, name, "unknown", call.method)
            found.append(TracedMask(source, tuple(ids.shape), padded=padded, shown_by="labels"))
    return tuple(found)


def _without_label(ids: Tensor, is_missing: Tensor) -> int:
    """How many samples have padding at one end: two or more equal ids without a label, but not as many in each."""
    has_label = ~is_missing.all(1)
    ids, is_missing = ids[has_label], is_missing[has_label]
    for rows, flags in ((ids, is_missing), (ids.flip(1), is_missing.flip(1))):
        run = flags.long().cumprod(1).bool()
        # Labels that were shifted by the user lack one at the last word, too.
        for part in (run, run & functional.pad(run[:, 1:], (0, 1))):
            count, values = part.sum(1), rows[part]
            if bool((count > 1).any() & (count != count[:1]).any()) and bool((values == values[0]).all()):
                return int((count > 0).sum())
    return 0
