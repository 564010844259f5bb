"""Forward hooks that record the neurons of student and teacher, one view for each forward of the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.reading.neurons import NeuronReader

__all__ = ["Recorder", "View"]

_VALID_MASKS = ("attention_mask", "padding_mask")
_PADDING_MASKS = ("src_key_padding_mask", "key_padding_mask")

Readers = Mapping[str, tuple[str, nn.Module, NeuronReader]]


@dataclass
class View:
    """What one forward of the student showed: readings ``(B, C, *positions)`` by key, in order of the calls.

    Attributes:
        root: Name of the module whose forward it was.
        student: Readings of the student, part of the autograd graph.
        teacher: Readings of the teacher, without graph.
        student_mask: Padding mask ``(B, T)`` of the student's input, true where a token is valid.
        teacher_mask: The same for the teacher.
    """

    root: str
    student: dict[str, list[Tensor]] = field(default_factory=dict)
    teacher: dict[str, list[Tensor]] = field(default_factory=dict)
    student_mask: Tensor | None = None
    teacher_mask: Tensor | None = None

    @property
    def has_gradient(self) -> bool:
        """Whether the student is trained by it; not so where its parameters are frozen for the moment, as in GANs."""
        return any(reading.requires_grad for readings in self.student.values() for reading in readings)

    @property
    def samples(self) -> int:
        """The number of samples, 0 where nothing was read."""
        return next((readings[0].shape[0] for readings in self.student.values()), 0)


class Recorder:
    """Records views while it is :attr:`enabled`; holds every hook that the package puts on a user's modules.

    Args:
        on_forward: Called when a candidate for the student's root starts a forward that counts, with its name and
            inputs; it may install readers and runs the teacher. Returns whether the forward is recorded.
    """

    def __init__(self, on_forward: Callable[[str, tuple[Any, ...], dict[str, Any]], bool]) -> None:
        self.on_forward = on_forward
        self.enabled = False
        self.views: list[View] = []
        self.current: View | None = None
        #: Forwards of the root inside the recorded one: another recorder of the same student traces its layers there.
        self.nested = 0
        #: Whether this recorder runs the teacher; another one may run the same module.
        self.runs_teacher = False
        self._root_handles: list[RemovableHandle] = []
        self._student_handles: list[RemovableHandle] = []
        self._teacher_handles: list[RemovableHandle] = []

    def watch_roots(self, candidates: Iterable[tuple[str, nn.Module]]) -> None:
        """Let ``on_forward`` know of forwards of these modules, outermost first."""
        self._remove(self._root_handles)
        for name, module in candidates:
            self._root_handles.append(module.register_forward_pre_hook(_OpenView(self, name), with_kwargs=True))
            # `always_call`, since a view that stays open after an exception would swallow the next forward.
            self._root_handles.append(module.register_forward_hook(_CloseView(self, name), always_call=True))

    def watch_student(self, readers: Readers) -> None:
        """Record these layers of the student: key -> (name, module, reader)."""
        self._student_handles = self._install(self._student_handles, "student", readers)

    def watch_teacher(self, readers: Readers) -> None:
        """Record these layers of the teacher."""
        self._teacher_handles = self._install(self._teacher_handles, "teacher", readers)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Let hooks do nothing inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def teacher_running(self) -> _TeacherRunning:
        """Record the teacher inside the block."""
        return _TeacherRunning(self)

    def take(self) -> list[View]:
        """The views recorded since the last call; they are forgotten here."""
        views, self.views = self.views, []
        return views

    def remove(self) -> None:
        """Take every hook off and forget what was recorded."""
        for handles in (self._root_handles, self._student_handles, self._teacher_handles):
            self._remove(handles)
        self.views, self.current, self.enabled = [], None, False
        self.nested, self.runs_teacher = 0, False

    def _install(self, handles: list[RemovableHandle], side: str, readers: Readers) -> list[RemovableHandle]:
        self._remove(handles)
        for key, (name, module, reader) in readers.items():
            if name.endswith(INPUT):
                hook = _ReadInput(self, side, key, reader)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(_ReadOutput(self, side, key, reader)))
        return handles

    @staticmethod
    def _remove(handles: list[RemovableHandle]) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()


class _TeacherRunning:
    """A block in which the teacher is recorded; a generator would not be compiled by torch 2.6."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def __enter__(self) -> None:
        self.recorder.runs_teacher = True

    def __exit__(self, *error: object) -> None:
        self.recorder.runs_teacher = False


class _Hook:
    """A hook that belongs to one recorder.

    Copies and pickles of a hooked module (weight averaging, checkpoints of whole modules) get a hook that does nothing:
    they must neither record nor drag the teacher along.
    """

    recorder: Recorder | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self).__new__(type(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (type(self),)


class _OpenView(_Hook):
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder = self.recorder
        if recorder is None or not recorder.enabled:
            return
        if recorder.current is not None:
            recorder.nested += recorder.current.root == self.name
            return
        if not torch.is_grad_enabled() or _in_backward():
            return
        recorder.current = View(self.name, student_mask=padding_mask(args, kwargs))
        recorded = False
        try:
            recorded = recorder.on_forward(self.name, args, kwargs)
        finally:
            if not recorded:
                recorder.current = None


class _CloseView(_Hook):
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recorder = self.recorder
        # Not enabled: a forward inside the recorded one, such as that which traces the layers.
        if recorder is None or not recorder.enabled or recorder.current is None or recorder.current.root != self.name:
            return
        if recorder.nested:
            recorder.nested -= 1
            return
        if output is not None:  # else the forward raised
            recorder.views.append(recorder.current)
        recorder.current = None


class _Read(_Hook):
    def __init__(self, recorder: Recorder, side: str, key: str, reader: NeuronReader) -> None:
        self.recorder, self.side, self.key, self.reader = recorder, side, key, reader

    def read(self, value: Any) -> None:
        recorder = self.recorder
        # Recomputation by activation checkpointing runs the hooks again, in the backward pass.
        if recorder is None or recorder.current is None or recorder.nested or _in_backward():
            return
        if self.side == "teacher" and not recorder.runs_teacher:
            return
        view = recorder.current
        readings, mask = (
            (view.student, view.student_mask) if self.side == "student" else (view.teacher, view.teacher_mask)
        )
        with _own_saved_tensors():
            reading = self.reader(value, mask)
        readings.setdefault(self.key, []).append(reading)


class _ReadOutput(_Read):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.read(output)


class _ReadInput(_Read):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.read(next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None))


def padding_mask(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The padding mask ``(B, T)`` among a model's inputs by its usual names, true where a token is valid."""
    named = {**(args[0] if args and isinstance(args[0], Mapping) else {}), **kwargs}
    for name in _VALID_MASKS:
        if isinstance(named.get(name), Tensor) and named[name].dim() == 2:
            return torch.ne(named[name], 0)
    for name in _PADDING_MASKS:
        if isinstance(named.get(name), Tensor) and named[name].dim() == 2 and named[name].dtype == torch.bool:
            return torch.logical_not(named[name])
    return None


def _in_backward() -> bool:
    # The public API has no question for this; torch.utils.checkpoint asks the same one.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _own_saved_tensors() -> AbstractContextManager[Any]:
    """Keep what a reading saves for its backward out of the count that activation checkpointing keeps."""
    return nullcontext() if torch.compiler.is_compiling() else saved_tensors_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor
