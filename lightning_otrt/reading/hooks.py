"""The forward hooks that are put on a user's modules: each belongs to one recorder and fills its current view."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_otrt.layers.mask_sources import MaskSource
from lightning_otrt.reading.arguments import argument_position
from lightning_otrt.reading.masks import as_rows, fit_mask, pad_nested, valid_tokens
from lightning_otrt.reading.neurons import NeuronReader
from lightning_otrt.reading.outputs import packed_mask, select_tensor, sequence_output
from lightning_otrt.reading.own_hook import OwnHook
from lightning_otrt.reading.torch_internals import is_in_backward, is_in_functional_transform
from lightning_otrt.reading.views import View

if TYPE_CHECKING:
    from lightning_otrt.reading.recorder import PatchMap, Recorder

__all__ = ["CloseView", "NoteGrid", "NoteMask", "OpenView", "ReadInput", "ReadOutput", "ViewAroundMethod", "mask_key"]


class _Hook(OwnHook):
    """A hook that belongs to one recorder."""

    recorder: Recorder | None = None

    @property
    def is_live(self) -> bool:
        """Whether it has a recorder."""
        return self.recorder is not None


class OpenView(_Hook):
    """Forward pre-hook of a module that may be the student's root: opens a view if the forward counts."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open a view, unless one is open or the forward is no training forward."""
        if self.leaves_copy(module):
            return
        recorder = self.recorder
        assert recorder is not None
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
        recorder.current = View(self.name)
        recorded = False
        try:
            recorded = recorder.on_forward(self.name, args, kwargs)
            # The hook for its own mask ran before the view was open.
            recorder.note_masks(module, args, kwargs)
        finally:
            if not recorded:
                recorder.current = None


class CloseView(_Hook):
    """Forward hook of the same module: closes the view and keeps it."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Close the view of this forward."""
        if self.leaves_copy(module):
            return
        recorder = self.recorder
        # Not enabled: a forward inside the recorded one, such as the one that traces the layers.
        if recorder is None or not recorder.enabled or recorder.current is None or recorder.current.root != self.name:
            return
        if recorder.nested:
            recorder.nested -= 1
            return
        view, recorder.current = recorder.current, None
        if output is None and sys.exc_info()[0] is not None:  # the forward raised
            return
        if recorder.read_output is not None:
            with _uncounted_saved_tensors():
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
        if self._before is not None:
            object.__setattr__(self.module, self.method, self._before)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = copy.deepcopy(self.module, memo)
        return getattr(type(copied), self.method).__get__(copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, self.method)


class NoteMask(_Hook):
    """Forward pre-hook of a module that gets a padding mask: puts the mask into the current view."""

    def __init__(self, recorder: Recorder, side: str, source: MaskSource, module: nn.Module) -> None:
        self.recorder, self.side, self.source, self.key = recorder, side, source, mask_key(side, source)
        # Looked up once: the signature of a forward is slow to read, and compiled code could not do it.
        self.position = argument_position(module, source.argument, source.method)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the mask of this forward."""
        if self.leaves_copy(module):
            return
        recorder = self.recorder
        if recorder is None or recorder.current is None or recorder.nested or is_in_backward():
            return
        if self.side == "teacher" and not recorder.runs_teacher:
            return
        name = self.source.argument
        value = kwargs.get(name)
        if value is None and self.position is not None and self.position < len(args):
            value = args[self.position]
        if value is None:
            wholes = (whole for whole in (*args, *kwargs.values()) if isinstance(whole, Mapping))
            value = next((whole[name] for whole in wholes if name in whole), None)
        mask = as_rows(value, self.source)
        recorder.current.masks[self.key] = None if mask is None else valid_tokens(mask, self.source)


class NoteGrid(_Hook):
    """Forward hook of a layer that gives the map from which tokens come: puts their rows and columns into the view."""

    def __init__(self, recorder: Recorder, side: str, patches: PatchMap) -> None:
        self.recorder, self.side, self.key = recorder, side, grid_key(side, patches)
        self.axes, self.merged = patches.axes, patches.merged

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note the size of this forward."""
        if self.leaves_copy(module):
            return
        recorder = self.recorder
        if recorder is None or recorder.current is None or recorder.nested or is_in_backward():
            return
        if self.side == "teacher" and not recorder.runs_teacher:
            return
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.dim() == len(self.axes) + 2:
            recorder.current.grids[self.key] = tuple(tensor.shape[axis] // self.merged for axis in self.axes)


def grid_key(side: str, patches: PatchMap) -> str:
    """The key of the rows and columns of tokens in a view."""
    return f"{side} {patches.name} / {patches.merged}"


def mask_key(side: str, source: MaskSource) -> str:
    """The key of a mask in a view."""
    return f"{side} {source.module}({source.argument}) {source.true_at}"


class _Read(_Hook):
    def __init__(
        self,
        recorder: Recorder,
        side: str,
        key: str,
        reader: NeuronReader,
        masks: Sequence[tuple[MaskSource, nn.Module]] = (),
        grid: str | None = None,
    ) -> None:
        self.recorder, self.side, self.key, self.reader, self.grid = recorder, side, key, reader, grid
        self.masks = [(mask_key(side, source), source, module) for source, module in masks]
        self.has_warned = self.has_looked = False

    def read(self, value: Any, own_mask: Tensor | None = None) -> None:
        """Add the reading of a layer's value to the current view; a mask of its own comes before the others."""
        recorder = self.recorder
        # In the backward pass activation checkpointing runs layers and their hooks again.
        if recorder is None or recorder.current is None or recorder.nested or is_in_backward():
            return
        if self.side == "teacher" and not recorder.runs_teacher:
            return
        # Those of the teacher are read all the same: what is kept of a sample may serve another run.
        if self.side == "student" and not recorder.reads_pairs and self.key.isdigit():
            return
        if is_in_functional_transform():
            raise RuntimeError(
                f"The {self.reader.layer} runs inside a transform of torch.func (vmap, jvp, grad, ...) of the network, "
                "and its tensors cannot leave it. Name a layer that the network calls outside of the transform."
            )
        view = recorder.current
        readings = view.student if self.side == "student" else view.teacher
        with _uncounted_saved_tensors():
            tensor = select_tensor(value, self.reader.select, where=self.reader.layer)
            if tensor.is_nested:
                masks = (view.masks.get(key) for key, _, _ in self.masks)
                tensor, own_mask = pad_nested(tensor, next((mask.shape[1] for mask in masks if mask is not None), None))
            mask = self._mask(view, tensor) if own_mask is None else own_mask
            size = None if self.grid is None else view.grids.get(self.grid)
            reading = self.reader(tensor, mask) if size is None else self.reader(tensor, mask, size)
        readings.setdefault(self.key, []).append(reading)

    def _mask(self, view: View, tensor: Tensor) -> Tensor | None:
        """The nearest mask that has the length of the layer."""
        size = self.reader.sequence_size(tensor)
        if size is None and self.masks and not self.has_looked:
            self._look_at_late_mask(view, tensor)
        misfit = None
        for key, source, module in self.masks:
            mask = view.masks.get(key)
            if mask is None or size is None:
                continue
            fitted = fit_mask(mask, *size, self.reader.prefix_tokens, module)
            if source.true_at == "unknown":
                self._warn_of_unknown(source, fitted)
                continue
            if fitted is not None:
                return fitted
            misfit = f"The mask {source.argument!r} has the shape {tuple(mask.shape)}, but {self.reader.layer} has "
            misfit += f"{size[1]} positions of {size[0]} samples"
            if source.is_named:
                raise ValueError(f"{misfit}. Name its own mask with LayerPair(mask=...), or pass mask=None.")
        if misfit is not None and not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"{misfit}, so that its padding is not left out. LayerPair(mask=...) names one.", stacklevel=2
            )
        return None

    def _look_at_late_mask(self, view: View, tensor: Tensor) -> None:
        """Warn where a mask that the first batch did not have leaves out tokens that are read as a map."""
        if tensor.dim() != 3 or torch.compiler.is_compiling():
            return
        samples, tokens = tensor.shape[self.reader.batch_axis], tensor.shape[1 - self.reader.batch_axis]
        for key, source, module in self.masks:
            mask = view.masks.get(key)
            if mask is None or source.true_at == "unknown":
                continue
            self.has_looked = True  # once: looking at values waits for the device
            fitted = fit_mask(mask, samples, tokens, self.reader.prefix_tokens, module)
            if fitted is not None and bool((~fitted).any()):
                warnings.warn(
                    f"The mask {source.argument!r}, which the first batch did not have, leaves out tokens of "
                    f"{self.reader.layer}, which are the patches of a map and are pooled like one: their padding is "
                    "read. LayerPair(mask=None) says that this is meant.",
                    stacklevel=2,
                )

    def _warn_of_unknown(self, source: MaskSource, fitted: Tensor | None) -> None:
        if fitted is None or self.has_warned:
            return
        self.has_warned = True
        name = source.argument
        warnings.warn(
            f"The argument {name!r}, which the first batch did not have, may be the padding mask of "
            f"{self.reader.layer}, but its name does not tell whether it marks valid tokens or padding. It is not "
            f'used: pass LayerPair(mask="{name}") if it is true at valid tokens, mask="~{name}" if it is true at '
            "padding, or mask=None.",
            stacklevel=2,
        )


class ReadOutput(_Read):
    """Forward hook that reads the output of a layer."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Read the output."""
        if self.leaves_copy(module):
            return
        self.read(sequence_output(module, output), packed_mask(output))


class ReadInput(_Read):
    """Forward pre-hook that reads the first tensor that enters a layer."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the input."""
        if self.leaves_copy(module):
            return
        self.read(next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None))


def _uncounted_saved_tensors() -> AbstractContextManager[Any]:
    """Keep the tensors that a reading saves out of the count that activation checkpointing compares.

    The recomputation in the backward pass makes no reading, so that the two counts would differ.
    """
    return nullcontext() if torch.compiler.is_compiling() else saved_tensors_hooks(_unchanged, _unchanged)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
