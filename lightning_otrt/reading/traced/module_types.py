"""What the type of a module tells: along which axis its output has the neurons, and its part in a network."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

__all__ = ["axis_of_type", "is_elementwise", "is_normalisation", "is_torch_norm", "role_of"]

_CHANNELS_FIRST = re.compile(
    r"_ConvNd|_BatchNorm|_InstanceNorm|GroupNorm|LocalResponseNorm|\w*Norm\w*2[dD]|\w*ChannelsFirst"
    r"|(Adaptive|Fractional)?(Max|Avg|LP)Pool[123]d|(Max)?Unpool[123]d|Pixel(Uns|S)huffle"
)
_CHANNELS_LAST = re.compile(r"Linear|Conv1D|Embedding|RNNBase")
#: Types of PyTorch. Other modules that are only called so may have either layout.
_OF_TORCH = {
    "Upsample": 1,
    "LayerNorm": -1,
    "RMSNorm": -1,
    "MultiheadAttention": -1,
    "TransformerEncoderLayer": -1,
    "TransformerDecoderLayer": -1,
}
_NORM = re.compile(r"\w*LayerNorm|\w*R(MS|ms)Norm")
_POOL = re.compile(r"\w*(Max|Avg|LP|Adaptive)Pool\w*")
#: May stand between a classification head and the output.
_PASSIVE = {
    *("Flatten", "Identity", "LogSoftmax", "ReLU", "Sigmoid", "Softmax", "Softplus", "Tanh"),
    *("ChannelShuffle", "Fold", "PixelShuffle", "PixelUnshuffle", "Unflatten"),
    *("Upsample", "UpsamplingBilinear2d", "UpsamplingNearest2d"),
}
_ELEMENTWISE = {"DropPath", "Identity", "LayerScale", "StochasticDepth"}
_ELEMENTWISE_HOMES = ("torch.nn.modules.activation", "torch.nn.modules.dropout")


def axis_of_type(module: nn.Module, shape: Sequence[int]) -> int | None:
    """The axis of the neurons that follows from the type of a module; None where the type does not tell.

    A normalisation that is only called LayerNorm may be channels-first, as in speech synthesis and image restoration:
    the size of its weights tells, unless both axes have it.

    Args:
        module: The module.
        shape: Shape of the tensor that enters or leaves it.

    Example:
        >>> axis_of_type(nn.Conv2d(3, 4, 1), (2, 4, 9, 9)), axis_of_type(nn.Linear(3, 4), (2, 9, 4))
        (1, 2)
    """
    dims = len(shape)
    if dims < 2:
        return None
    if dims == 2:
        return 1
    if getattr(module, "data_format", None) == "channels_first":
        return 1
    normalized = getattr(module, "normalized_shape", ())
    # Subclasses before their bases: a LayerNorm2d is channels-first although its base is channels-last.
    for base in type(module).__mro__:
        name = base.__name__
        if _CHANNELS_FIRST.fullmatch(name) or (name == "Upsample" and dims > 3):
            return 1
        if _CHANNELS_LAST.fullmatch(name):
            return dims - 1
        if name in _OF_TORCH and base.__module__.startswith("torch."):
            return None if isinstance(normalized, tuple) and len(normalized) > 1 else _OF_TORCH[name] % dims
        if _NORM.fullmatch(name):
            by_weights = _axis_of_weights(module, shape)
            if by_weights is not None or not isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                return by_weights
    return None


def _axis_of_weights(module: nn.Module, shape: Sequence[int]) -> int | None:
    """The second or the last axis, if it alone has the size of the module's weights."""
    sizes = {parameter.numel() for parameter in module.parameters()}
    fitting = {axis for axis in (1, len(shape) - 1) if {shape[axis]} == sizes}
    return fitting.pop() if len(fitting) == 1 else None


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


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module is called as one that normalises over the neurons and keeps the layout of its input."""
    return any(_NORM.fullmatch(name) for name in _type_names(module))


def is_torch_norm(module: nn.Module) -> bool:
    """Whether it is a normalisation of torch over the last axis, whatever that axis holds."""
    is_last = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1
    return is_last and axis_of_type(module, (2, 3, 4)) == 2


def is_elementwise(module: nn.Module) -> bool:
    """Whether the type of a module tells that it keeps the layout of its input."""
    return not _ELEMENTWISE.isdisjoint(_type_names(module)) or any(
        base.__module__ in _ELEMENTWISE_HOMES for base in type(module).__mro__
    )


def _type_names(module: nn.Module) -> list[str]:
    return [base.__name__ for base in type(module).__mro__]
