"""A fingerprint of a teacher: one line that changes with its weights to the bit, its code and each setting."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Collection
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.reading.torch_internals import unwrapped
from lightning_otrt.teacher.cache.sample_hash import SampleHash
from lightning_otrt.teacher.frozen.plain_facts import plain_facts, tensor_attributes

__all__ = ["fingerprint"]


def fingerprint(module: nn.Module, ignored: Collection[str] = (), **settings: Any) -> str:
    """The type of a teacher, a hash of its code and structure and of all its parameters and buffers, and settings.

    Same bytes and same code, same fingerprint, on any device and in any process. It reads all weights once, about a
    second per gigabyte on a CPU, and waits for the device.

    Args:
        module: The network as it runs, in its type.
        ignored: Names of plain attributes that do not count, since each forward changes them.
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
    module = unwrapped(module)  # compiled or not, it is the same teacher
    attributes = {name: tensor for name, tensor in tensor_attributes(module).items() if name not in ignored}
    own = {**dict(chain(module.named_parameters(), module.named_buffers())), **attributes}
    if unset := [name for name, tensor in own.items() if tensor.is_meta]:
        raise ValueError(
            f"{unset[0]!r} of the teacher is on the meta device, so it has no values: materialise the teacher first "
            "with `to_empty`, and load its weights."
        )
    if spread := [name for name, tensor in own.items() if hasattr(tensor, "device_mesh")]:
        raise TypeError(
            f"{spread[0]!r} of the teacher is spread over processes. Let each process have the whole teacher, or leave "
            "out `teacher_cache`"
        )
    tensors = {name: tensor[None] for name, tensor in own.items()}
    weights = SampleHash()(((tensors,), {}), 1)[0].tolist() if tensors else []
    facts = sorted((name, fact) for name, fact in plain_facts(module).items() if name not in ignored)
    # Functions and objects show where they lie, which is somewhere else in each process.
    shown = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{module!r}\n{facts}")
    structure = hashlib.sha256(shown.encode() + _constants(module)).hexdigest()[:16]
    digits = "".join(f"{half % 2**64:016x}" for half in weights)
    told = "".join(f", {name}={value!r}" for name, value in sorted(settings.items()))
    return f"{type(module).__name__}-{structure}-{digits}{told}"


def _constants(module: nn.Module) -> bytes:
    """What a network keeps beside parameters and buffers: weights of frozen script modules and of quantized layers."""
    found = io.BytesIO()
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule) and hasattr(part, "forward"):
            graph: Any = part.inlined_graph
            for node in graph.findAllNodes("prim::Constant", recurse=True):
                value = node.output().toIValue()
                found.write(_as_bytes(value) if isinstance(value, Tensor) else f"{value}".encode())
    if not isinstance(module, torch.jit.ScriptModule):
        known = {name for name, _ in chain(module.named_parameters(), module.named_buffers())}
        for name, value in sorted(module.state_dict().items()):
            if name not in known:
                found.write(name.encode() + (_as_bytes(value) if isinstance(value, Tensor) else repr(value).encode()))
    return found.getvalue()


def _as_bytes(tensor: Tensor) -> bytes:
    plain = tensor.dequantize() if tensor.is_quantized else tensor
    return plain.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
