"""Lists beside the tensors of a batch that have an entry for each sample, such as the names of files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_otrt.reading.containers import map_inputs
from lightning_otrt.reading.traced.arguments import Inputs
from lightning_otrt.teacher.cache.samples import leaves
from lightning_otrt.teacher.host_copy import HostCopy

__all__ = ["SampleKeys", "has_entries", "split_entries"]

#: Stands in the inputs for a list whose entries are hashed with their samples.
_TAKEN = "entries of the samples"


class SampleKeys:
    """Keys ``(B, 2)`` of samples that are on their way to the host; the hashes of their entries are there already.

    Args:
        copied: The keys of the tensors.
        entries: The hashes of :func:`split_entries`.
    """

    def __init__(self, copied: HostCopy, entries: np.ndarray[Any, np.dtype[np.int64]] | None) -> None:
        self._copied, self._entries = copied, entries

    def wait(self) -> Tensor:
        """The keys on the CPU. Both parts are hashes of 128 bits, so that their exclusive or is one, too."""
        keys = self._copied.wait()
        return keys if self._entries is None else keys ^ torch.from_numpy(self._entries)


def has_entries(inputs: Inputs, batch_size: int) -> bool:
    """Whether there are lists or tuples without tensors that are as long as the batch.

    Example:
        >>> has_entries((({"image": torch.zeros(2, 3), "file": ["a.png", "b.png"]},), {}), 2)
        True
    """
    return split_entries(inputs, batch_size)[1] is not None


def split_entries(inputs: Inputs, batch_size: int) -> tuple[Inputs, np.ndarray[Any, np.dtype[np.int64]] | None]:
    """Take the lists that are as long as the batch out of its inputs.

    Returns:
        The inputs without them, and a hash ``(B, 2)`` of the entries of each sample; None where there are none.

    Raises:
        TypeError: If an entry is no text, no number, and no container of these.
    """
    found: list[Sequence[Any]] = []

    def take(values: Sequence[Any]) -> Any:
        if len(values) != batch_size:
            return values
        found.append(values)
        return _TAKEN

    others = map_inputs(inputs, lambda tensor: tensor, take)
    if not found:
        return others, None
    digests = b"".join(_digest(entries) for entries in zip(*found, strict=True))
    return others, np.frombuffer(digests, dtype=np.int64).reshape(batch_size, 2).copy()


def _digest(entries: Any) -> bytes:
    content = "\n".join(f"{path}={value!r}" for path, value in leaves(entries))
    return hashlib.blake2b(content.encode(), digest_size=16).digest()
