"""Notices that the weights of a teacher change while its outputs are kept."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.reading.torch_internals import tensor_tables, version_of
from lightning_otrt.teacher.host_copy import HostCopy

__all__ = ["WeightWatch"]


class WeightWatch:
    """Tells whether parameters or buffers of a module may have changed since it was made, in a fraction of a forward.

    Every write to a tensor raises its version. One through its ``data``, as moving averages do, does not; so one number
    of each tensor is compared, too, and sums of all bytes where asked for: five milliseconds for 100 MB on a CPU. It
    does not say how they changed: a fingerprint does.

    Args:
        module: The module that its owner may train.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> watch = WeightWatch(net)
        >>> watch.changed(watch.look())
        ''
        >>> net.weight.data.mul_(0.999)[0, 0] == net.weight[0, 0]
        tensor(True)
        >>> watch.changed(watch.look())
        'weight'
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._tensors = _tensors(module)
        self._state = _state(self._tensors)
        # They are held, so that no other module gets the identity of one that is gone.
        self._parts = list(module.modules())
        self._holding = self._held()
        self._groups: dict[tuple[torch.device, torch.dtype], tuple[list[str], list[Tensor]]] = {}
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                if tensor.numel():
                    names, values = self._groups.setdefault((tensor.device, tensor.dtype), ([], []))
                    names.append(name)
                    # A view: it shows what the tensor holds at any time.
                    values.append(tensor.detach()[tuple(size // 2 for size in tensor.shape)])
            self._values = [values.wait() for values in self.look(everything=True)]

    @torch.no_grad()
    def look(self, *, everything: bool = False) -> list[HostCopy]:
        """What is compared, on its way to the host.

        Args:
            everything: Whether all bytes enter, or one number of each tensor.
        """
        found = [torch.stack(values).view(torch.uint8) for _, values in self._groups.values()]
        if everything:
            for names, _ in self._groups.values():
                found.append(torch.stack([_sum(self._tensors[name].detach()) for name in names]).view(torch.uint8))
        return [HostCopy(values) for values in found]

    def changed(self, looked: list[HostCopy]) -> str:
        """The name of a tensor that has changed, been replaced or moved; ``""`` if there is none.

        Args:
            looked: What :meth:`look` returned.
        """
        tensors = self._tensors
        if self._held() != self._holding:  # to walk the modules by name takes six times as long
            tensors = _tensors(self._module)
            if tensors.keys() != self._tensors.keys():
                return min(tensors.keys() ^ self._tensors.keys())
        state = _state(tensors)
        if state != self._state:
            return next(name for name, before, now in zip(tensors, self._state, state, strict=True) if before != now)
        names = [names for names, _ in self._groups.values()]
        # Sums come after the values, group by group; there are none in a shorter look.
        for group, values, copied in zip([*names, *names], self._values, looked, strict=False):
            now = copied.wait()
            if not torch.equal(now, values):
                differs = (now != values).view(len(group), -1).any(1)
                return group[int(differs.nonzero()[0])]
        return ""

    def _held(self) -> list[int]:
        """Which parameters, buffers and modules the modules hold."""
        tables = (table for part in self._parts for table in tensor_tables(part))
        return [*map(id, chain.from_iterable(table.values() for table in tables))]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _state(tensors: dict[str, Tensor]) -> list[Any]:
    return [(id(tensor), version_of(tensor), tensor.data_ptr()) for tensor in tensors.values()]


def _sum(tensor: Tensor) -> Tensor:
    """The sum of the bytes of a tensor, in words of eight."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    whole = len(flat) // 8 * 8
    words = flat[:whole] if flat.storage_offset() % 8 == 0 else flat[:whole].clone()
    return words.view(torch.int64).sum() + flat[whole:].sum()
