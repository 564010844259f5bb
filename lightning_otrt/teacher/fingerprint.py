"""A fingerprint of a teacher: one line that changes with every bit of its weights and with every setting."""

from __future__ import annotations

import hashlib
from itertools import chain
from typing import Any

from torch import nn

from lightning_otrt.teacher.sample_hash import SampleHash

__all__ = ["fingerprint"]


def fingerprint(module: nn.Module, **settings: Any) -> str:
    """The type of a teacher, a hash of its structure and of all its parameters and buffers, and settings.

    Same bytes, same fingerprint, on any device and in any process. What a module keeps in plain attributes counts as
    far as its ``repr`` shows it. It reads all weights once, about a second per gigabyte on a CPU, and waits for the
    device.

    Args:
        module: The network as it runs, in its type.
        settings: What else decides on what is kept of a sample; the ``repr`` of each value has to say all of it.

    Raises:
        ValueError: If a parameter or buffer is on the meta device.
        TypeError: If a parameter or buffer is no dense tensor, such as one that is spread over processes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Linear(2, 1)
        >>> before = fingerprint(net, layers=("0",), grid=4)
        >>> fingerprint(net, layers=("0",), grid=4) == before, fingerprint(net, layers=("0",), grid=2) == before
        (True, False)
        >>> _ = net.weight.data.add_(1e-3)
        >>> fingerprint(net, layers=("0",), grid=4) == before
        False
    """
    own = dict(chain(module.named_parameters(), module.named_buffers()))
    if unset := [name for name, tensor in own.items() if tensor.is_meta]:
        raise ValueError(
            f"{unset[0]!r} of the teacher is on the meta device, so it has no values: materialise the teacher first "
            "with `to_empty`, and load its weights."
        )
    tensors = {name: tensor[None] for name, tensor in own.items()}
    weights = SampleHash()(((tensors,), {}), 1)[0].tolist() if tensors else []
    structure = hashlib.sha256(repr(module).encode()).hexdigest()[:16]
    digits = "".join(f"{half % 2**64:016x}" for half in weights)
    told = "".join(f", {name}={value!r}" for name, value in sorted(settings.items()))
    return f"{type(module).__name__}-{structure}-{digits}{told}"
