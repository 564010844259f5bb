"""Which of a model's inputs is its padding mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["padding_mask"]

#: Names of masks that are true where a token is valid, and of masks that are true at padding.
_VALID_MASKS = ("attention_mask", "padding_mask")
_PADDING_MASKS = ("src_key_padding_mask", "key_padding_mask")


def padding_mask(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The padding mask ``(B, T)`` among a model's inputs, found by its usual names.

    Args:
        args: Positional arguments; names are looked up in the first one if it is a mapping.
        kwargs: Keyword arguments.

    Returns:
        The mask as booleans, true where a token is valid; None if there is none.

    Example:
        >>> padding_mask((), {"attention_mask": torch.tensor([[1, 1, 0]])})
        tensor([[ True,  True, False]])
    """
    named = {**(args[0] if args and isinstance(args[0], Mapping) else {}), **kwargs}
    for name in _VALID_MASKS:
        if isinstance(named.get(name), Tensor) and named[name].dim() == 2:
            return torch.ne(named[name], 0)
    for name in _PADDING_MASKS:
        if isinstance(named.get(name), Tensor) and named[name].dim() == 2 and named[name].dtype == torch.bool:
            return torch.logical_not(named[name])
    return None
