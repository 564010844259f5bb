"""Run a user's module in evaluation mode and on another device, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from lightning_otrt.reading.torch_internals import unwrapped
from lightning_otrt.teacher.frozen.max_norm import WithoutWrites

__all__ = ["BorrowedModule", "enter_training"]


class BorrowedModule:
    """Runs a module in evaluation mode, and remembers where it came from; :meth:`give_back` moves it back.

    Modes are changed for these runs alone: the module may be the target network of the user's own loss, whose batch
    normalisation is in training mode.

    Args:
        module: The module. It is not copied.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.Dropout().eval())
        >>> with BorrowedModule(net).in_evaluation_mode():
        ...     [module.training for module in net.modules()]
        [False, False, False]
        >>> [module.training for module in net.modules()]
        [True, True, False]
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._parts: list[nn.Module] = []
        self._children: list[int] = []
        self._device: torch.device | None = None
        self._homes: list[tuple[nn.Module, str, torch.device]] = []
        self._writes = WithoutWrites(module)

    def get_ready(self) -> None:
        """Note all parts, which code that is compiled finds noted, and let none write to its weights in a forward."""
        # A part may have been replaced since. To walk over all names takes ten times as long as this look.
        if not self._parts or _children_of(self._parts) != self._children:
            self._writes.allow()
            # Without a wrapper that compiles: code that is compiled cannot change the mode of both.
            self._parts = list(unwrapped(self.module).modules())
            self._children, self._writes = _children_of(self._parts), WithoutWrites(self.module)
        self._writes.stop()

    @contextmanager
    def in_evaluation_mode(self) -> Iterator[None]:
        """Evaluation mode inside the block."""
        self.get_ready()
        switched = self.leave_training()
        try:
            yield
        finally:
            enter_training(switched)

    def leave_training(self) -> list[nn.Module]:
        """Take all parts out of training mode; those that were in it."""
        # A frozen script module has no such flag.
        switched = [part for part in self._parts if getattr(part, "training", False)]
        for part in switched:
            # Not by `eval`: users override `train` and `eval`, to merge weights for example.
            part.training = False
        return switched

    def move_to(self, device: torch.device | str) -> None:
        """Move the module to a device, unless it is there."""
        device = torch.device(device)
        # The user may have moved the module since. One tensor shows it, and walking over all of them takes long.
        first = next(chain(self.module.parameters(), self.module.buffers()), None)
        if self._device == device and (first is None or _is_on(first, device)):
            return
        places = _places(self.module)
        if not all(_is_on(tensor, device) for _, _, tensor in places):
            self._homes = self._homes or [(owner, name, tensor.device) for owner, name, tensor in places]
            self.module.to(device)
        self._device = device

    def give_back(self) -> None:
        """Move it back, but only if it was moved here: another borrower may still run the module."""
        self._writes.allow()
        if self._homes:
            # `to` also updates the device of a LightningModule. The loop is for modules on several devices.
            self.module.to(self._homes[0][2])
            for owner, name, home in self._homes:
                tensor = getattr(owner, name, None)
                if isinstance(tensor, Tensor) and tensor.device != home:
                    tensor.data = tensor.data.to(home)
        self._parts, self._device, self._homes = [], None, []


def enter_training(parts: Iterable[nn.Module]) -> None:
    """Put these modules, and none inside them, into training mode."""
    for part in parts:
        part.training = True


def _children_of(parts: Iterable[nn.Module]) -> list[int]:
    """Which modules these hold, by identity: as long as these are held, no other one gets the identity of one."""
    return [*map(id, chain.from_iterable(part.children() for part in parts))]


def _places(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Every parameter and buffer, with the module that holds it and its name there."""
    return [
        (owner, name, tensor)
        for owner in module.modules()
        for name, tensor in chain(
            owner.named_parameters(recurse=False, remove_duplicate=False),
            owner.named_buffers(recurse=False, remove_duplicate=False),
        )
    ]


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index or 0)
