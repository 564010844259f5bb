"""Which kind of plan suits a pair of layers: do their neurons have axes of their own, or may they be rotated?

Neurons behind a pointwise nonlinearity have axes of their own: rotating them changes the network. A residual stream, a
linear bottleneck and the output of a linear layer or a normalisation have none: the next layer can undo any rotation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_otrt.layers.pairs import INPUT, LayerPair
from lightning_otrt.layers.trace import Trace

__all__ = ["choose_plans", "has_own_axes"]

#: Types of modules without children that are a pointwise nonlinearity.
_NONLINEAR = re.compile(
    r"\w*ReLU\d?|\w*ELU\w*|SiLU\w*|\w*Swish\w*|\w*Mish\w*|Soft(plus|sign|shrink)|Hard\w+|\w*Tanh\w*"
    r"|\w*Sigmoid\w*|Threshold|\w*Activation"
)
#: Roles and types whose output has the axes of what enters them.
_PASSING_ROLES = ("pool", "dropout")
_PASSING = re.compile(r"Flatten|Identity|DropPath|StochasticDepth|LayerScale\w*|Upsample|Unflatten")


def choose_plans(pairs: Sequence[LayerPair], student: Trace, teacher: Trace) -> tuple[str, ...]:
    """``"sinkhorn"`` where the neurons of both layers have axes of their own, else ``"orthogonal"``.

    Args:
        pairs: The pairs.
        student: Trace of the student that looked at values.
        teacher: Trace of the teacher that looked at values.
    """
    return tuple(
        "sinkhorn"
        if has_own_axes(student, pair.student, pair.select) and has_own_axes(teacher, pair.teacher, pair.select)
        else "orthogonal"
        for pair in pairs
    )


def has_own_axes(trace: Trace, name: str, select: str | int | None = None) -> bool:
    """Whether the neurons of a layer stand behind a pointwise nonlinearity.

    Few and small negative values show a nonlinearity that cuts them off, also one that is a function. Else the type of
    the module that made the tensor may tell, as for a hyperbolic tangent. Behind pooling, dropout and the like, the
    module before it counts.

    Args:
        trace: A trace that looked at values.
        name: The layer, or ``"name:input"``.
        select: Key or index of the tensor, where the layer returns several.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_otrt.reading.tracer import trace
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1))
        >>> seen = trace(net, (torch.randn(2, 3, 8, 8),), values=True)
        >>> [has_own_axes(seen, name) for name in ("0", "1", "2", "3:input", "3")]
        [False, True, True, True, False]
    """
    tensor = trace.tensor(name, select)
    if tensor is not None and tensor.is_rectified:
        return True
    made_by = trace.layer(name).input_from if name.endswith(INPUT) else name
    passed: set[str] = set()
    while made_by is not None and made_by not in passed:
        passed.add(made_by)
        layer = trace.layer(made_by)
        if layer.role == "recurrent" or (not layer.is_container and _NONLINEAR.fullmatch(layer.kind)):
            return True
        is_passing = layer.role in _PASSING_ROLES or _PASSING.fullmatch(layer.kind)
        made_by = layer.input_from if is_passing else layer.output_from
    return False
