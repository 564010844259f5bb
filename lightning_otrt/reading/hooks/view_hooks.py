"""Hooks around a forward of the student: they open and close the view that it fills."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_otrt.reading.hooks.recorder_hook import RecorderHook, uncounted_saved_tensors
from lightning_otrt.reading.torch_internals import is_in_backward, is_in_functional_transform

if TYPE_CHECKING:
    from lightning_otrt.reading.hooks.recorder import Recorder

__all__ = ["CloseView", "OpenView", "ViewAroundMethod"]


class OpenView(RecorderHook):
    """Forward pre-hook of a module that may be the student's root: opens a view if the forward counts."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open a view, unless one is open or the forward is no training forward."""
        recorder = self.recorder
        if recorder.enabled and recorder.current is not None:
            recorder.nested += recorder.current.root == self.name
            return
        if is_in_backward():
            return
        recorder.teacher_output = None  # of an earlier forward
        if not recorder.enabled or not torch.is_grad_enabled():
            return
        if is_in_functional_transform():
            raise RuntimeError(
                "A transform of torch.func (grad, vmap, jacrev, ...) runs the student while it is recorded. What is "
                "recorded inside of one cannot be used outside of it. Forwards of inner steps are no part of the term; "
                "leave them out:\n\n    with transfer.paused():  # in a Trainer: callback.transfer.paused()\n"
                "        gradients = torch.func.grad(loss_of)(parameters, x)\n\n"
                "A forward by torch.func.functional_call alone is recorded as usual."
            )
        recorder.open(self.name)
        recorded = False
        try:
            recorded = recorder.on_forward(self.name, args, kwargs)
            # The hook for its own mask ran before the view was open.
            recorder.note_masks(module, args, kwargs)
        finally:
            if not recorded:
                recorder.close()


class CloseView(RecorderHook):
    """Forward hook of the same module: closes the view and keeps it."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Close the view of this forward."""
        recorder = self.recorder
        # Not enabled: a forward inside the recorded one, such as the one that traces the layers.
        if not recorder.enabled or recorder.current is None or recorder.current.root != self.name:
            return
        if recorder.nested:
            recorder.nested -= 1
            return
        view = recorder.close()
        assert view is not None
        if output is None and sys.exc_info()[0] is not None:  # the forward raised
            return
        if recorder.read_output is not None:
            with uncounted_saved_tensors():
                recorder.read_output(output, view)
        recorder.views.append(view)


class ViewAroundMethod:
    """Stands in for a method of a module and opens and closes a view around it, as the hooks do around a forward.

    Copies and pickles of the module get the plain method.

    Args:
        module: The module.
        method: Name of its method.
        opens: Called as a forward pre-hook before the method.
        closes: Called as a forward hook after it, with None as output where it raised an error.
    """

    def __init__(
        self,
        module: nn.Module,
        method: str,
        opens: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
        closes: Callable[[nn.Module, tuple[Any, ...], Any], None],
    ) -> None:
        self.module, self.method = module, method
        self.inner = getattr(module, method)
        self.__wrapped__ = self.inner
        self._before = module.__dict__.get(method)
        self._hooks: tuple[Any, Any] | None = (opens, closes)
        object.__setattr__(module, method, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method inside a view."""
        if self._hooks is None:  # removed, but another one was put around it
            return self.inner(*args, **kwargs)
        opens, closes = self._hooks
        opens(self.module, args, kwargs)
        output = None
        try:
            output = self.inner(*args, **kwargs)
        finally:
            closes(self.module, args, output)
        return output

    def remove(self) -> None:
        """Give the module back what stood there before."""
        self._hooks = None
        if self.module.__dict__.get(self.method) is not self:
            return
        object.__delattr__(self.module, self.method)
        before = self._before
        while isinstance(before, ViewAroundMethod) and before._hooks is None:  # removed while this one was around it
            before = before._before
        if before is not None:
            object.__setattr__(self.module, self.method, before)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = copy.deepcopy(self.module, memo)
        return getattr(type(copied), self.method).__get__(copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, self.method)
