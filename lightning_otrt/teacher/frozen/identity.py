"""Short texts that tell teachers of one architecture apart in checkpoints, without reading all their weights."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from torch import Tensor, nn

from lightning_otrt.layers.names import named_layers, own_parameters, primary_names
from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.student_root.reach import leads_to
from lightning_otrt.reading.torch_internals import unwrapped

__all__ = ["checksum_before", "stem_checksum", "whole_checksum"]

#: Values of each parameter that enter a checksum, beside its shape.
_VALUES = 16


def stem_checksum(module: nn.Module) -> str:
    """The type of a module and a checksum of its first parameter, which is known before any forward.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> before = stem_checksum(net)
        >>> nn.init.zeros_(net[1].weight)
        Parameter containing:
        tensor([[0., 0.],
                [0., 0.]], requires_grad=True)
        >>> stem_checksum(net) == before
        True
    """
    module = unwrapped(module)  # compiled or not, it is the same teacher
    first = next(module.parameters(), None)
    return f"{type(module).__name__}-{_checksum([] if first is None else [first])}"


def whole_checksum(module: nn.Module) -> str:
    """A checksum of all parameters, which tells teachers with other heads apart.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> before = whole_checksum(net)
        >>> nn.init.zeros_(net[1].weight)
        Parameter containing:
        tensor([[0., 0.],
                [0., 0.]], requires_grad=True)
        >>> whole_checksum(net) == before
        False
    """
    return _checksum(unwrapped(module).parameters())


def checksum_before(module: nn.Module, layers: Iterable[str], trace: Trace) -> str:
    """A checksum of the parameters that lead to layers: those of modules that ran before or inside one of them.

    So a teacher with another head has the same one where the layers lie before the head.

    Args:
        module: The teacher.
        layers: Names of its layers.
        trace: Its traced forward.
    """
    modules = named_layers(module)
    primary = primary_names(modules, trace.root)
    names = tuple(layers)
    found: dict[int, Tensor] = {}
    for part in modules.values():
        if any(leads_to(primary[id(part)], layer, trace) for layer in names):
            found.update((id(parameter), parameter) for parameter in own_parameters(part))
    return _checksum(found.values())


def _checksum(parameters: Iterable[Tensor]) -> str:
    checksum = 0
    for parameter in parameters:
        if not parameter.is_meta and not nn.parameter.is_lazy(parameter):
            values = parameter.detach().flatten()[:_VALUES].cpu().double()
            checksum = zlib.crc32(repr(tuple(parameter.shape)).encode() + values.numpy().tobytes(), checksum)
    return f"{checksum:08x}"
