"""What the type of a module tells: along which axis its output has the neurons, and its part in a network."""

from __future__ import annotations

import re

from torch import nn

__all__ = ["axis_of_type", "is_elementwise", "role_of"]

_CHANNELS_FIRST = re.compile(
    r"_ConvNd|_BatchNorm|_InstanceNorm|GroupNorm|LocalResponseNorm|\w*Norm\w*2[dD]|\w*ChannelsFirst"
    r"|(Adaptive|Fractional)?(Max|Avg|LP)Pool[123]d|(Max)?Unpool[123]d|Upsample|Pixel(Uns|S)huffle"
)
_CHANNELS_LAST = re.compile(
    r"Linear|Conv1D|\w*LayerNorm|\w*RMSNorm|Embedding|MultiheadAttention|Transformer(En|De)coderLayer|RNNBase"
)
_POOL = re.compile(r"\w*(Max|Avg|LP|Adaptive)Pool\w*")
#: May stand between a classification head and the output.
_PASSIVE = {"Flatten", "Identity", "LogSoftmax", "ReLU", "Sigmoid", "Softmax", "Softplus", "Tanh", "Upsample"}
_ELEMENTWISE = {"DropPath", "Identity", "LayerScale", "StochasticDepth"}
_ELEMENTWISE_HOMES = ("torch.nn.modules.activation", "torch.nn.modules.dropout")


def axis_of_type(module: nn.Module, dims: int) -> int | None:
    """The axis of the neurons that follows from the type of a module; None where the type does not tell.

    Args:
        module: The module.
        dims: Number of axes of the tensor that enters or leaves it.

    Example:
        >>> axis_of_type(nn.Conv2d(3, 4, 1), 4), axis_of_type(nn.Linear(3, 4), 3), axis_of_type(nn.ReLU(), 3)
        (1, 2, None)
    """
    if dims < 2:
        return None
    if dims == 2:
        return 1
    if getattr(module, "data_format", None) == "channels_first":
        return 1
    normalized = getattr(module, "normalized_shape", ())
    # Subclasses before their bases: a LayerNorm2d is channels-first although its base is channels-last.
    for name in _type_names(module):
        if _CHANNELS_FIRST.fullmatch(name):
            return 1
        if _CHANNELS_LAST.fullmatch(name):
            return None if isinstance(normalized, tuple) and len(normalized) > 1 else dims - 1
    return None


def role_of(module: nn.Module) -> str:
    """The part of a module in a network; see ``role`` of :class:`~lightning_otrt.layers.trace.TracedLayer`."""
    names = _type_names(module)
    if "Linear" in names or "Conv1D" in names:
        return "linear"
    if "_ConvNd" in names:
        return "pointwise" if set(getattr(module, "kernel_size", ())) == {1} else "conv"
    if "_DropoutNd" in names:
        return "dropout"
    if "RNNBase" in names:
        return "recurrent"
    if any(_POOL.fullmatch(name) for name in names):
        return "pool"
    return "passive" if names[0] in _PASSIVE else ""


def is_elementwise(module: nn.Module) -> bool:
    """Whether the type of a module tells that it keeps the layout of its input."""
    return not _ELEMENTWISE.isdisjoint(_type_names(module)) or any(
        base.__module__ in _ELEMENTWISE_HOMES for base in type(module).__mro__
    )


def _type_names(module: nn.Module) -> list[str]:
    return [base.__name__ for base in type(module).__mro__]
