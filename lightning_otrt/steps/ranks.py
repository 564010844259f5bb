"""Communication between the processes of a global batch: sums of tensors, and checks that they agree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

__all__ = ["Ranks", "on_flat_buffers"]

Message = TypeVar("Message")

#: Bytes worth a collective of their own. Up to so many more are sent to save one: another all-reduce costs tens of
#: microseconds whatever its size, in which a network moves about this much.
COLLECTIVE_BYTES = 2**16


class Ranks:
    """The processes that share one global batch, each with a part of its samples.

    Every method but :meth:`world` is a collective: all processes call it, in the same order, with tensors of the same
    shapes and types.

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
        """The processes of ``group``; None if there is only one, or torch.distributed is not initialized."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        ranks = cls(group)
        return ranks if ranks.size > 1 else None

    def sum(self, message: Message) -> Message:
        """The message with every tensor in it summed over processes.

        Args:
            message: Tensors of one device in any nested lists, tuples, dictionaries and named tuples. They are not
                changed.
        """
        return self._on_all(message, lambda flat: dist.all_reduce(flat, group=self.group))

    def broadcast(self, message: Message) -> Message:
        """The message of the first process; see :meth:`sum`."""
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        return self._on_all(message, lambda flat: dist.broadcast(flat, source, group=self.group))

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of each process, by rank. Waits for the device."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def have_same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors have the same bits on all processes, by a checksum. Waits for the device."""
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return len(set(self.gather(digest.digest()))) == 1

    def any(self, flags: Sequence[bool], device: torch.device | str) -> list[bool]:
        """Whether each flag is set on some process. Waits for the device."""
        counts = self.sum(torch.tensor([float(flag) for flag in flags], device=device))
        return [count > 0 for count in counts.tolist()]

    @staticmethod
    def _on_all(message: Message, collective: Callable[[Tensor], Any]) -> Message:
        tensors: list[Tensor] = []
        apply_to_collection(message, Tensor, tensors.append)
        changed = iter(on_flat_buffers(tensors, collective))
        return apply_to_collection(message, Tensor, lambda _: next(changed))


def on_flat_buffers(tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> list[Tensor]:
    """Run an in-place collective on tensors of any shapes and types, laid end to end in few buffers.

    There is one buffer for each type, but tensors of a narrower type join the buffer of the widest where that adds no
    more than :data:`COLLECTIVE_BYTES`. Widening loses nothing.

    Args:
        tensors: Tensors on one device. Integers above 2^24 need a float64 among the tensors to keep all digits.
        collective: Changes a flat buffer in place.

    Returns:
        The changed tensors, each in its own shape and type. The given ones stay as they are.

    Example:
        >>> import torch
        >>> on_flat_buffers([torch.ones(2), torch.ones((), dtype=torch.float64)], lambda flat: flat.mul_(4))
        [tensor([4., 4.]), tensor(4., dtype=torch.float64)]
    """
    results: list[Tensor] = [tensor.detach() for tensor in tensors]
    for dtype, indices in _by_buffer(results).items():
        flat = torch.cat([results[index].reshape(-1).to(dtype) for index in indices])
        collective(flat)
        parts = torch.split(flat, [results[index].numel() for index in indices])
        for index, part in zip(indices, parts, strict=True):
            results[index] = part.view(results[index].shape).to(results[index].dtype)
    return results


def _by_buffer(tensors: Sequence[Tensor]) -> dict[torch.dtype, list[int]]:
    """Which tensors go into the buffer of which type; the same on all processes, since shapes and types are."""
    if not tensors:
        return {}
    widest = tensors[0].dtype
    for tensor in tensors:
        widest = torch.promote_types(widest, tensor.dtype)
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    groups: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        added = sizes[tensor.dtype] * (widest.itemsize - tensor.dtype.itemsize)
        groups.setdefault(widest if added <= COLLECTIVE_BYTES else tensor.dtype, []).append(index)
    return groups
