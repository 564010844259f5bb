"""Padding that the values of inputs show where no argument has the name of a mask: for warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_otrt.layers.mask_sources import MaskSource, TracedMask
from lightning_otrt.reading.masks.names import is_mask_name, names_other_mask
from lightning_otrt.reading.masks.padded_ids import BY_IDS, padded_ids, padded_labels
from lightning_otrt.reading.masks.padding_shapes import is_at_ends, is_triangle, place_of
from lightning_otrt.reading.masks.values import as_rows, is_pairwise
from lightning_otrt.reading.torch_internals import is_in_functional_transform
from lightning_otrt.reading.traced.calls import ModuleCall, is_tensor

__all__ = ["ShownPadding", "padded_arguments"]

#: Numbers up to this one hide a token from others, where they are added to scores.
_HIDDEN = -1e4
#: Names of what a loss is computed from: one flag for each position may be its label.
_TARGETS = ("target", "targets", "y")
#: Words in the names of whole numbers, one for each sample, that are no counts.
_NO_COUNTS = {"class", "classes", "id", "ids", "idx", "index", "label", "labels", "target", "targets", "y"}
_NO_COUNTS |= {"step", "t", "time", "timestep", "timesteps"}


class ShownPadding:
    """Collects what the calls of a traced forward show of padding."""

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], TracedMask] = {}

    def note(self, call: ModuleCall, around: Sequence[ModuleCall] = ()) -> None:
        """Look at a call.

        Args:
            call: The call.
            around: The calls around it, innermost first; none for that of the whole network.
        """
        if is_in_functional_transform():  # which cannot look at values
            return
        shown = *padded_arguments(call, is_inner=bool(around)), *padded_ids(call, around), *_padded_attributes(call)
        for mask in shown:
            # Many layers may get one mask.
            source = mask.source.argument if mask.shown_by == "inner" else mask.source
            key = (source, mask.shape, mask.shown_by, mask.is_of_target)
            self._found.setdefault(key, mask)

    def found(self) -> tuple[TracedMask, ...]:
        """All that was shown. What the whole network gets comes first."""
        return tuple(sorted(self._found.values(), key=lambda mask: mask.shown_by in ("inner", "attribute", *BY_IDS)))


def padded_arguments(call: ModuleCall, *, is_inner: bool = False) -> tuple[TracedMask, ...]:
    """What the arguments of a forward show of padding ``(B, T)``: labels, flags without a name, lengths, NaN, zeros.

    Flags are booleans, floats of 0 and 1, or floats of 0 and minus infinity, that are the same up to some position of
    each sample and different behind it, but not in all samples alike. It waits for the device, in the traced forward
    only.

    Args:
        call: The call of the network, or of a module inside of it.
        is_inner: Whether it is a module inside.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> pad = torch.arange(3) >= torch.tensor([[1], [3], [2]])
        >>> call = ModuleCall("", nn.Identity(), {"x": torch.ones(3, 3, 8), "pad": pad})
        >>> {mask.source.argument for mask in padded_arguments(call)}
        {'pad'}
    """
    found = list(padded_labels(call))
    for name, value, kind in _values(call.arguments):
        if value is call.sequence and (is_inner or is_pairwise(value)):  # such as images
            continue
        source = MaskSource(call.name, name, "unknown", call.method)
        is_known = is_mask_name(name) or names_other_mask(name) or name in _TARGETS
        flags = () if is_known else tuple(_flags(value))
        found.extend(_shown(rows, source, "inner" if is_inner else kind) for rows in flags if _may_be_padding(rows))
        if flags or is_inner:
            continue
        # Numbers (B, T) beside a sequence may be weights.
        is_series = value.dim() == 3 or (value.dim() == 2 and value is call.sequence)
        if is_series and value.is_floating_point():
            for is_marked, shown_by in ((value.isnan(), "nan"), (value == 0, "zeros")):
                for is_padding in _positions(is_marked):
                    is_certain = is_at_ends(is_padding) & _at_same_end(is_padding) & (is_padding.sum(1) > 1).any()
                    if bool(is_certain):
                        found.append(_shown(is_padding, source, shown_by))
        elif _are_counts(name, value):
            found.append(TracedMask(source, tuple(value.shape), longest=int(value.max()), shown_by="lengths"))
    return tuple(found)


def _padded_attributes(call: ModuleCall) -> Iterator[TracedMask]:
    """Flags that a module keeps in a plain attribute, as where a mask is set before the forward."""
    for name, value in vars(call.module).items():
        if _is_dense(value) and not names_other_mask(name):
            source = MaskSource(call.name, name, "unknown", call.method)
            yield from (_shown(rows, source, "attribute") for rows in _flags(value) if _may_be_padding(rows))


def _may_be_padding(rows: Tensor) -> bool:
    """Whether flags ``(B, T)`` change once in each sample, and not in all alike."""
    return bool(is_at_ends(rows) | is_at_ends(~rows)) and not is_triangle(rows)


def _values(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, str]]:
    """Dense tensors with their names, also those in a list or tuple, and the kind of warning of flags there."""
    for name, value in arguments.items():
        if _is_dense(value):
            yield name, value, "unknown"
        elif isinstance(value, (list, tuple)):
            # The fields of a named tuple are arguments by themselves.
            items = () if hasattr(value, "_fields") else enumerate(value)
            yield from ((f"{name}[{place}]", item, "inside") for place, item in items if _is_dense(item))


def _is_dense(value: Any) -> bool:
    return is_tensor(value) and value.layout == torch.strided


def _flags(value: Tensor) -> Iterator[Tensor]:
    """A tensor of flags as booleans ``(B, T)``, with samples along either axis; none for anything else.

    Of flags that say which token sees which it gives those that are the same for all tokens that look.
    """
    rows = value if is_pairwise(value) else as_rows(value)
    if rows is None or rows.numel() == 0 or rows.is_complex():
        return
    if rows.dtype != torch.bool:
        is_zero = rows == 0
        is_flag = (is_zero | (rows == 1)).all() | (is_zero | (rows <= _HIDDEN)).all()
        if not rows.is_floating_point() or not bool(is_flag):
            return
        rows = rows != 0
    if rows.dim() > 2:
        looking = tuple(range(1, rows.dim() - 1))
        yield from (torch.amin(rows, looking), torch.amin(~rows, looking))
    else:
        yield from (rows, rows.T)


def _positions(is_marked: Tensor) -> tuple[Tensor, ...]:
    """At which positions ``(B, T)`` a series (B, T, C), (T, B, C), (B, C, T) or (B, T) is marked in all channels."""
    if is_marked.dim() == 2:
        return (is_marked,)
    return is_marked.all(2), is_marked.all(2).T, is_marked.all(1)


def _are_counts(name: str, value: Tensor) -> bool:
    """Whether an argument may hold the number of positions of each sample ``(B,)``."""
    if value.dim() != 1 or not value.numel() or value.is_floating_point() or value.dtype == torch.bool:
        return False
    is_other = not _NO_COUNTS.isdisjoint(name.lower().split("_"))
    return not is_other and bool((value > 0).all() & (value != value[0]).any())


def _at_same_end(is_padding: Tensor) -> Tensor:
    """Whether it stands in front in all samples, or behind in all. Images read row by row have zeros on both sides."""
    return ~(is_padding[:, 0].any() & is_padding[:, -1].any())


def _shown(is_padding: Tensor, source: MaskSource, kind: str) -> TracedMask:
    padded, place = int(is_padding.any(1).sum()), place_of(is_padding)
    return TracedMask(source, tuple(is_padding.shape), padded=padded, shown_by=kind, place=place)
