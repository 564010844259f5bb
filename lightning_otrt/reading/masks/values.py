"""Padding masks as booleans: what their elements mean, and whether they have the length of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import MaskSource
from lightning_otrt.reading.neurons.nested import lengths_mask

__all__ = [
    "NO_LABEL",
    "as_rows",
    "count_frames",
    "fit_mask",
    "is_pairwise",
    "problem_of",
    "unknown_polarity",
    "valid_tokens",
]

#: The label that losses leave out, in torch and in Hugging Face.
NO_LABEL = -100
#: The largest number of a mask of floats that is not added to scores.
_LARGEST = 100


def as_rows(value: Any, source: MaskSource | None = None) -> Tensor | None:
    """A mask ``(B, T)``, also one given as ``(B, 1, T)``, ``(B, 1, 1, T)`` or ``(B, T, 1)``; None for anything else.

    Args:
        value: What the argument holds.
        source: Where it is from. A pairwise mask gives its tokens that some token sees, also where that of the traced
            forward was none.
    """
    may_be_pairwise = source is not None and (source.is_named or source.is_turned or source.true_at != "padding")
    if source is not None and may_be_pairwise and is_pairwise(value):
        rows = tuple(range(1, value.dim() - 1))
        if source.true_at != "padding":
            return torch.amax(value, rows)
        # True at padding: that is what is hidden from all. One that is added to scores is 0 where a token is seen.
        if not value.is_floating_point():
            return torch.amin(value, rows)
        return torch.where((value < 0).any(), torch.amax(value, rows), torch.amin(value, rows))
    if source is not None and source.true_at == "label" and not (isinstance(value, Tensor) and _are_labels(value)):
        return None
    if not isinstance(value, Tensor) or value.is_nested or not 2 <= value.dim() <= 4:
        return None
    if sum(size != 1 for size in value.shape[1:]) > 1:
        return None
    return value.flatten(1)


def _are_labels(value: Tensor) -> bool:
    """Whether a tensor may hold a label for each position: one for each sample, or targets of a regression, do not."""
    return value.dim() == 2 and not value.is_floating_point() and value.dtype != torch.bool


def is_pairwise(value: Any) -> bool:
    """Whether a mask says for each sample which token sees which: ``(B, T, T)`` or ``(B, heads, T, T)``."""
    if not isinstance(value, Tensor) or value.is_nested or value.dim() not in (3, 4):
        return False
    return value.shape[-1] == value.shape[-2] > 1


def problem_of(mask: Tensor, source: MaskSource) -> str:
    """Why it is not known which elements of a mask are padding, ``""`` where it is. It looks at the values."""
    if source.is_named or source.is_turned or source.true_at != "padding" or mask.dtype == torch.bool:
        return ""
    kind = str(mask.dtype).removeprefix("torch.")
    if not mask.is_floating_point():
        return f"it holds {kind} numbers"
    return f"it holds {kind} numbers above 0, which no mask has that is added to scores" if (mask > 0).any() else ""


def valid_tokens(mask: Tensor, source: MaskSource) -> Tensor:
    """The mask as booleans, true where a token is valid, without a wait for its device.

    A mask of numbers with a negative one is added to scores: 0 is valid, whatever its name. So is one with numbers far
    above 0, as Longformer has at the tokens that all others look at.

    Args:
        mask: ``(B, T)``.
        source: Where it is from, which tells what true elements mean.

    Raises:
        ValueError: If a mask that is named after padding holds integers.

    Example:
        >>> valid_tokens(torch.tensor([[0.0, 0.0, -1e9]]), MaskSource("", "attention_mask", "valid"))
        tensor([[ True,  True, False]])
    """
    if source.true_at == "padding":
        if not (source.is_named or source.is_turned or mask.dtype == torch.bool or mask.is_floating_point()):
            raise ValueError(unknown_polarity(source, problem_of(mask, source)))
        return torch.eq(mask, 0)
    if source.true_at == "label":
        return torch.ne(mask, NO_LABEL)
    if mask.dtype == torch.bool:
        return mask
    positive, not_hidden = torch.gt(mask, 0), torch.ge(mask, 0)
    is_added = ~(not_hidden.all() & positive.any())
    if mask.is_floating_point():
        is_added = is_added | torch.gt(mask, _LARGEST).any()
    return torch.where(is_added, not_hidden, positive)


def unknown_polarity(source: MaskSource, problem: str) -> str:
    """The message for a mask that may mean either."""
    name = source.argument
    return (
        f"It is not known whether the mask {name!r} of {source.module or 'the network'!r} marks valid tokens or "
        f'padding: {problem}. Pass LayerPair(..., mask="{name}") if its non-zero elements are valid '
        f'tokens, mask="~{name}" if they are padding, or mask=None to read padding too.'
    )


def fit_mask(mask: Tensor, samples: int, tokens: int, prefix: int, module: nn.Module) -> Tensor | None:
    """The mask of a layer's tokens from that of a module around it; None where it has another length.

    Args:
        mask: ``(B, T)`` as booleans, true where a token is valid.
        samples: Number of samples of the layer.
        tokens: Number of tokens, a prefix included.
        prefix: Number of prefix tokens, which the mask may leave out.
        module: The module that got the mask. One for speech tells how many frames come from how many samples of a
            signal.

    Returns:
        ``(B, tokens)`` or ``(B, tokens - prefix)``.
    """
    if mask.shape in ((samples, tokens), (samples, tokens - prefix)):
        return mask
    if mask.shape in ((tokens, samples), (tokens - prefix, samples)):
        return mask.transpose(0, 1)
    if mask.shape[0] == samples and count_frames(module, mask.shape[1]) == tokens:
        return lengths_mask(_frames(module, mask.sum(1)), tokens)
    return None


def count_frames(module: nn.Module, samples: int) -> int | None:
    """How many frames a speech model of Hugging Face makes of so many samples of a signal; None for other modules."""
    if not callable(getattr(module, "_get_feat_extract_output_lengths", None)):
        return None
    frames = _frames(module, torch.tensor([samples]))
    return int(frames[0]) if isinstance(frames, Tensor) and frames.shape == (1,) else None


def _frames(module: nn.Module, samples: Tensor) -> Any:
    # Private, but all speech models of Hugging Face have it; without it there is no mask, and a warning.
    return module._get_feat_extract_output_lengths(samples)  # type: ignore[operator]
