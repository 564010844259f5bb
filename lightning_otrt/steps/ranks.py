"""What the processes of a global batch say to each other: one flat sum a round, and checks that they agree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "flat_sum"]


class Ranks:
    """The processes that share one global batch, each with a part of its samples.

    Every method but :meth:`world` is a collective: all processes call it, in the same order.

    Args:
        group: Their process group; None is that of all processes.

    Attributes:
        size: Number of processes.
        rank: Place of this process among them.

    Raises:
        ValueError: If this process is not in the group.

    Example:
        >>> Ranks.world() is None  # a single process
        True
    """

    def __init__(self, group: Any | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("This process is not in the `process_group` of the global batch. Pass its own group.")

    @classmethod
    def world(cls, group: Any | None = None) -> Ranks | None:
        """The processes of ``group``, or None where there is but one or torch.distributed is not in use."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        ranks = cls(group)
        return ranks if ranks.size > 1 else None

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum over processes of each tensor, in one all-reduce; the tensors are not changed."""
        return flat_sum(tensors, self._all_reduce)

    def broadcast(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of the first process, of the same shapes and types everywhere, in one broadcast."""
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)

        def send(flat: Tensor) -> None:
            dist.broadcast(flat, source, group=self.group)

        return flat_sum(tensors, send)

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of each process, by rank. Waits for the device."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def have_same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors are the same everywhere, bit by bit, judged by a checksum. Waits for the device."""
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return len(set(self.gather(digest.digest()))) == 1

    def any(self, flag: bool, device: torch.device | str) -> bool:
        """Whether the flag is set on some process. Waits for the device."""
        [total] = self.sum([torch.tensor(float(flag), device=device)])
        return bool(total > 0)

    def _all_reduce(self, flat: Tensor) -> None:
        dist.all_reduce(flat, group=self.group)


def flat_sum(tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> list[Tensor]:
    """Run one in-place collective on tensors of any shapes and types, laid end to end in the widest of the types.

    Args:
        tensors: Tensors on one device. Integers beyond 2^24 need a float64 among them to keep all digits.
        collective: Changes a flat buffer in place.

    Returns:
        What it made of each tensor, in its own shape and type: new tensors, the given ones are not changed.

    Example:
        >>> import torch
        >>> flat_sum([torch.ones(2), torch.ones((), dtype=torch.float64)], lambda flat: flat.mul_(4))
        [tensor([4., 4.]), tensor(4., dtype=torch.float64)]
    """
    if not tensors:
        return []
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    flat = torch.cat([tensor.detach().reshape(-1).to(widest) for tensor in tensors])
    collective(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]
