"""Run a user's module on another device and in evaluation mode, and give it back as it was."""

from __future__ import annotations

import weakref
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_otrt.reading.torch_internals import add_forward_pre_hook
from lightning_otrt.teacher.frozen.max_norm import WithoutWrites
from lightning_otrt.teacher.frozen.trained_elsewhere import TrainedElsewhere

__all__ = ["BorrowedModule"]

#: Modules that were in train mode until a borrower came. Another one, which may keep them longer, has to know.
_OUT_OF_TRAINING: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class BorrowedModule:
    """Remembers the modes and devices that a module came with; :meth:`give_back` restores those that were changed here.

    Args:
        module: The module. It is not copied.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.Dropout().eval())
        >>> borrowed = BorrowedModule(net)
        >>> borrowed.set_evaluation_mode()
        >>> [module.training for module in net.modules()]
        [False, False, False]
        >>> borrowed.give_back()
        >>> [module.training for module in net.modules()]
        [True, True, False]
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._modes: list[tuple[nn.Module, bool]] = []
        self._changed_modes = False
        self._device: torch.device | None = None
        self._homes: list[tuple[nn.Module, str, torch.device]] = []
        self._writes = WithoutWrites(module)
        self._watch: RemovableHandle | None = None

    def set_evaluation_mode(self) -> None:
        """Put the module and all inside it into evaluation mode, in which they do not write to their weights."""
        self._writes.stop()
        if not self._modes:
            # A frozen script module has no such flag.
            self._modes = [
                (module, module in _OUT_OF_TRAINING or getattr(module, "training", False))
                for module in self.module.modules()
            ]
        training = [module for module, _ in self._modes if getattr(module, "training", False)]
        for module in training:
            # Not by `eval`: users override `train` and `eval`, to merge weights for example.
            module.training = False
            _OUT_OF_TRAINING.add(module)
        self._changed_modes = self._changed_modes or bool(training)
        if self._changed_modes and self._watch is None:
            self._watch = add_forward_pre_hook(self.module, TrainedElsewhere())

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
        """Restore devices and modes, but only what was changed here: another borrower may still run the module."""
        self._writes.allow()
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        if self._changed_modes:
            for module, mode in self._modes:
                if getattr(module, "training", mode) != mode:
                    module.training = mode
                _OUT_OF_TRAINING.discard(module)
        if self._homes:
            # `to` also updates the device of a LightningModule. The loop is for modules on several devices.
            self.module.to(self._homes[0][2])
            for owner, name, home in self._homes:
                tensor = getattr(owner, name, None)
                if isinstance(tensor, Tensor) and tensor.device != home:
                    tensor.data = tensor.data.to(home)
        self._modes, self._changed_modes, self._device, self._homes = [], False, None, []


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
