"""How padding lies in a mask: at the ends of sequences, and at the edges of images."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_at_ends", "is_triangle", "padded_images", "place_of"]


def is_at_ends(is_padding: Tensor) -> Tensor:
    """Whether the true flags ``(B, T)`` lie only at the ends of each sample, or fill it, and their number differs.

    Example:
        >>> bool(is_at_ends(torch.tensor([[False, True, True], [False, False, False]])))
        True
    """
    count = is_padding.sum(1)
    return _end_somewhere(is_padding).all() & (count != count[:1]).any()


def place_of(is_padding: Tensor) -> str:
    """At which ends of samples flags ``(B, T)`` stand, those all over a sample left out. It waits for the device.

    Example:
        >>> place_of(torch.tensor([[False, True, True], [True, True, True], [False, False, False]]))
        'the end'
    """
    is_part = ~is_padding.all(1)
    found = bool((is_padding[:, 0] & is_part).any()), bool((is_padding[:, -1] & is_part).any())
    return {(True, False): "the start", (False, True): "the end"}.get(found, "both ends")


def is_triangle(mask: Tensor) -> bool:
    """Whether a mask ``(T, T)`` is causal: one token more is seen by each. It waits for the device.

    Example:
        >>> is_triangle(torch.ones(3, 3).tril()), is_triangle(torch.ones(3, 3))
        (True, False)
    """
    if mask.shape[0] != mask.shape[1] or len(mask) < 2:
        return False
    flags = mask != 0
    full = torch.ones_like(flags)
    return any(torch.equal(flags, shape) for shape in (full.tril(), full.triu(), ~full.tril(), ~full.triu()))


def padded_images(mask: Tensor) -> int:
    """In how many images a mask ``(B, H, W)`` leaves out edges; 0 for labels of pixels, holes, and other masks.

    What is left is a rectangle at a corner of each image. It waits for the device.

    Example:
        >>> inside = (torch.arange(4) < torch.tensor([[2], [4]]))[:, :, None].expand(2, 4, 3)
        >>> padded_images(inside), padded_images(~inside), padded_images(torch.randint(5, (2, 4, 3)))
        (1, 1, 0)
    """
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        return 0
    for valid in (mask != 0, mask == 0):
        rows, columns = valid.any(2), valid.any(1)
        is_rectangle = (valid == rows[:, :, None] & columns[:, None]).all()
        if bool(is_rectangle & rows.any(1).all() & _at_one_end(~rows).all() & _at_one_end(~columns).all()):
            return int((~valid).flatten(1).any(1).sum())
    return 0


def _at_one_end(is_padding: Tensor) -> Tensor:
    """For each sample, whether its flags stand in front alone, or behind alone."""
    count = is_padding.sum(1)
    return (_leading(is_padding) == count) | (_leading(is_padding.flip(1)) == count)


def _end_somewhere(is_padding: Tensor) -> Tensor:
    """For each sample, whether its flags stand at its ends alone, or all over it."""
    at_ends = _leading(is_padding) + _leading(is_padding.flip(1))
    return (is_padding.sum(1) == at_ends) | is_padding.all(1)


def _leading(values: Tensor) -> Tensor:
    """How many elements of each row are true before the first that is not."""
    return values.long().cumprod(1).sum(1)
