"""Which axis of a tensor holds the samples, and how many samples a batch has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["count_samples", "has_lists_of_samples", "input_samples", "is_rectified", "is_sequence_first"]

#: Smooth rectifiers (GELU, SiLU, Mish, Hardswish) have small negative values, none of them below this one.
LOWEST = -0.4
#: Sum of all negative values over that of all positive ones, up to which values count as rectified. It is 1 for values
#: that are symmetric around 0, and 0.2 to 0.3 behind GELU and SiLU of a standard normal distribution.
NEGATIVE_SHARE = 0.5


def is_rectified(values: Tensor) -> bool:
    """Whether values look like those behind a nonlinearity that cuts off negative ones. It waits for the device.

    Example:
        >>> import torch
        >>> values = torch.linspace(-3, 3, 100)
        >>> is_rectified(values), is_rectified(values.relu()), is_rectified(torch.nn.functional.gelu(values))
        (False, True, True)
    """
    if values.is_nested:
        values = values.values()
    values = values.detach().float()
    lowest, positive = values.amin(), values.clamp_min(0).sum()
    negative = positive - values.sum()
    few = (lowest >= LOWEST) & (negative <= NEGATIVE_SHARE * positive)
    return bool((positive > 0) & ((lowest >= 0) | few))


def is_sequence_first(module: nn.Module) -> bool | None:
    """Whether a module takes ``(T, B, C)``: its own ``batch_first``, else the one that all modules inside it agree on.

    ``nn.TransformerEncoder`` has no ``batch_first`` of its own; the attention inside its layers has.

    Returns:
        None where nothing tells.

    Example:
        >>> from torch import nn
        >>> is_sequence_first(nn.TransformerEncoderLayer(8, 2, batch_first=True)), is_sequence_first(nn.LSTM(4, 4))
        (False, True)
    """
    own = getattr(module, "batch_first", None)
    if isinstance(own, bool):
        return not own
    inside = {inner.batch_first for inner in module.modules() if isinstance(getattr(inner, "batch_first", None), bool)}
    return not inside.pop() if len(inside) == 1 else None


def count_samples(inputs: Sequence[Tensor], outputs: Iterable[Tensor], *, sequence_first: bool = False) -> int:
    """The number of samples of a forward: the size that most inputs and outputs have along the axis of the samples.

    The first input has no more weight than the others, since it may be a label or a camera matrix.

    Args:
        inputs: All tensors that enter.
        outputs: All tensors that leave.
        sequence_first: Whether sequences are ``(T, B, ...)``; then the second axis counts too, and decides a tie.

    Returns:
        The number of samples; 0 where no tensor has an axis.

    Example:
        >>> import torch
        >>> camera, images, logits = torch.eye(3), torch.zeros(8, 3, 4, 4), torch.zeros(8, 10)
        >>> count_samples([camera, images], [logits])
        8
    """
    votes: Counter[int] = Counter()
    tensors = [tensor for tensor in (*inputs, *outputs) if not tensor.is_nested and tensor.dim()]
    for tensor in tensors:
        axes = {0, 1} if sequence_first and tensor.dim() in (2, 3) else {0}
        votes.update({tensor.shape[axis] for axis in axes})
    if not votes:
        return 0
    preferred = 1 if sequence_first else 0
    first = [tensor.shape[preferred] for tensor in tensors if tensor.dim() > preferred]
    most = max(votes.values())
    tied = [size for size, count in votes.items() if count == most]
    return next((size for size in first if size in tied), tied[0])


def has_lists_of_samples(arguments: Iterable[Any], output: Any) -> bool:
    """Whether samples enter as items of a list, and a mapping leaves for each, as in the detectors of torchvision.

    Each item is an image, or a mapping that holds one (detectron2).

    Their tensors have no axis of samples: how many boxes are found depends on values, down to their rounding.

    Args:
        arguments: What enters.
        output: What leaves.

    Example:
        >>> import torch
        >>> images = [torch.zeros(3, 8, 8), torch.zeros(3, 9, 7)]
        >>> has_lists_of_samples([images], [{"boxes": torch.zeros(1, 4)}, {"boxes": torch.zeros(5, 4)}])
        True
        >>> named = [{"image": image, "file_name": "a.png"} for image in images]
        >>> has_lists_of_samples([named], [{"instances": ...}, {"instances": ...}])
        True
        >>> has_lists_of_samples([torch.stack([images[0]] * 2)], [{"boxes": torch.zeros(1, 4)}] * 2)
        False
        >>> views = [torch.zeros(8, 3, 9, 9), torch.zeros(8, 3, 5, 5)]
        >>> has_lists_of_samples([views], [{"logits": torch.zeros(8, 4)}] * 2)
        False
    """
    if not (isinstance(output, (list, tuple)) and output and all(isinstance(item, Mapping) for item in output)):
        return False
    lists = [value for value in arguments if isinstance(value, (list, tuple)) and len(value) == len(output)]
    return any(all(map(holds_image, value)) for value in lists)


def holds_image(item: Any) -> bool:
    """Whether an item is an image (C, H, W) or holds one. Views of a batch, one output for each, have an axis more."""
    values = item.values() if isinstance(item, Mapping) else (item,)
    return any(isinstance(value, Tensor) and value.dim() == 3 for value in values)


def input_samples(inputs: Sequence[Tensor]) -> frozenset[int]:
    """The sizes along the first axis of inputs with two or more axes: images and prompts may differ in number.

    Example:
        >>> import torch
        >>> sorted(input_samples([torch.zeros(8, 3, 4, 4), torch.zeros(5, 10), torch.zeros(1, 7), torch.zeros(2)]))
        [5, 8]
    """
    return frozenset(tensor.shape[0] for tensor in inputs if not tensor.is_nested and tensor.dim() > 1) - {1}
