"""A short text that tells teachers of one architecture apart, without reading all their weights."""

from __future__ import annotations

import zlib

from torch import nn

__all__ = ["fingerprint"]

#: Values of each parameter that enter the checksum.
_VALUES = 16


def fingerprint(module: nn.Module) -> str:
    """The type of a module and a checksum of the first values of each of its parameters.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Linear(2, 2)
        >>> before = fingerprint(net)
        >>> with torch.no_grad():
        ...     _ = net.weight.add_(1.0)
        >>> before.startswith("Linear-"), fingerprint(net) == before
        (True, False)
    """
    checksum = 0
    for parameter in module.parameters():
        if not parameter.is_meta and not nn.parameter.is_lazy(parameter):
            values = parameter.detach().flatten()[:_VALUES].double().cpu()
            checksum = zlib.crc32(values.numpy().tobytes(), checksum)
    return f"{type(module).__name__}-{checksum:08x}"
