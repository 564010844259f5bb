"""Whether a mask that a network made means the opposite of its name, as its values in the traced forward show.

All of it waits for the device, in the traced forward only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_otrt.layers.mask_sources import MaskSource
from lightning_otrt.reading.masks.names import is_mask_name
from lightning_otrt.reading.masks.values import as_rows, is_pairwise
from lightning_otrt.reading.traced.calls import ModuleCall

__all__ = ["means_the_opposite"]


def means_the_opposite(value: Any, source: MaskSource, root: ModuleCall) -> bool:
    """Whether a mask makes no sense by its name, and does the other way round.

    Args:
        value: What the argument holds.
        source: Where it is from, and what its name says.
        root: The call of the network. A mask may be empty because the one that the network got is.
    """
    if _hides_later_tokens(value, source):
        return True
    return _leaves_nothing(value, source) and not _is_empty_mask(value, root)


def _leaves_nothing(value: Any, source: MaskSource) -> bool:
    """Whether a mask of booleans or whole numbers marks no token of any sample, read by its name.

    Whole numbers of a mask that is named after padding may mean either.
    """
    if not isinstance(value, Tensor) or value.is_nested or not value.numel():
        return False
    if source.true_at == "padding":
        return value.dtype == torch.bool and bool(value.all())
    return source.true_at == "valid" and not (value.is_floating_point() or value.is_complex()) and not bool(value.any())


def _hides_later_tokens(value: Any, source: MaskSource) -> bool:
    """Whether a pairwise mask is causal and true at what is hidden, as in Megatron, though its name says the opposite.

    By its name each token would see all later ones, and neither itself nor the one before it would be seen by all.
    """
    if source.true_at != "valid" or not is_pairwise(value) or value.is_floating_point() or value.is_complex():
        return False
    hidden = value != 0
    # The first token may be hidden from all, as padding or by its kind, and each from itself: no triangle then.
    own, before = hidden.diagonal(0, -2, -1)[..., 1:], hidden.diagonal(-1, -2, -1)
    if bool(own.all()) or bool(before.all()):
        return False
    return bool((hidden | ~torch.ones_like(hidden).triu(1)).all())


def _is_empty_mask(value: Tensor, root: ModuleCall) -> bool:
    """Whether the network got a mask of the same tokens that marks none."""
    rows = as_rows(value)
    given = (as_rows(mask) for name, mask in root.arguments.items() if is_mask_name(name))
    return rows is not None and any(
        mask is not None and mask.shape == rows.shape and not bool(mask.any()) for mask in given
    )
