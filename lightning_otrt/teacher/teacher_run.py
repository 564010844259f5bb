"""The teacher's run on the inputs of a student's forward, with the hooks that read its layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from lightning_otrt.reading.hooks.recorder import Readers, Recorder
from lightning_otrt.reading.pairing import Pairing
from lightning_otrt.reading.traced.arguments import Inputs
from lightning_otrt.reading.warnings.failed_teacher import teacher_failed
from lightning_otrt.teacher.cache.cached_run import CachedRun, CacheUse
from lightning_otrt.teacher.frozen.frozen_teacher import Teacher
from lightning_otrt.teacher.logit_recording import LogitRecording
from lightning_otrt.teacher.replaced import Places, places_of

__all__ = ["TeacherRun"]


class TeacherRun:
    """Runs the teacher beside one student, on its device and in its type.

    Args:
        teacher: The teacher.
        recorder: Its hooks read the teacher's layers, into the view of the student's forward.
        grid: Positions kept along each axis of a feature map.
        cache: Where readings of the teacher are kept; None: it runs on each batch.
        logits: Reads the logits of both networks, where they are distilled.
    """

    def __init__(
        self,
        teacher: Teacher,
        recorder: Recorder,
        grid: int | None,
        cache: CacheUse | None,
        logits: LogitRecording | None,
    ) -> None:
        self.teacher, self.grid = teacher, grid
        self._recorder, self._logits = recorder, logits
        self._cached = None if cache is None else CachedRun(teacher, recorder, cache, self._read_logits)
        self._pairing: Pairing | None = None
        #: What is recorded of the teacher's layers.
        self.readers: Readers = {}
        #: Where they are.
        self.places: Places = {}
        #: The student's first parameter of floating point, and its type when the student was attached.
        self._parameter: nn.Parameter | None = None
        self._attached_dtype: torch.dtype | None = None

    def start(self, student: nn.Module) -> None:
        """Note the type of a student that is attached now."""
        self._parameter = _first_parameter(student)
        self._attached_dtype = None if self._parameter is None else self._parameter.dtype

    def stop(self) -> None:
        """Write what was kept, and give the teacher back on its device and in its mode."""
        self._parameter, self.readers, self.places = None, {}, {}
        try:
            if self._cached is not None:
                self._cached.close()
        finally:
            self.teacher.release()

    def prepare(self, student: nn.Module) -> None:
        """Bring the teacher to the student's device, and to its type where a precision plugin changed that."""
        if not torch.compiler.is_compiling():  # Dynamo cannot list the parameters of a module that it compiles
            self._parameter = _first_parameter(student)
        if self._parameter is None:
            return
        if self._parameter.dtype != self._attached_dtype:
            self.teacher.follow(self._parameter.dtype)
        self.teacher.prepare(self._parameter.device)

    def learning(self) -> AbstractContextManager[None]:
        """See what the forwards of the teacher in the block change, where its outputs are kept."""
        return nullcontext() if self._cached is None else self._cached.learning()

    def watch(self, pairing: Pairing) -> None:
        """Put hooks on the teacher's layers of these pairs."""
        self._pairing = pairing
        module = self.teacher.module
        self.readers, logits = pairing.readers("teacher", module, self.grid), self._logits
        self.places = places_of(module, self.readers)
        if logits is not None:
            logits.use_teacher(pairing, module)
        self._recorder.watch_teacher(self.readers, () if logits is None else logits.masks("teacher"))

    def __call__(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the teacher on what the student gets. Its readings go to the current view."""
        cached = self._cached
        if cached is not None:
            self._run_cached(student, args, kwargs, lambda *inputs: cached(inputs))
            return
        self._make_ready(student)
        inputs = self.teacher.inputs_for(args, kwargs)
        output = self._run(student, inputs, functools.partial(self.teacher.run_recorded, self._recorder))
        self._recorder.keep_output(output)
        self._read_logits(output)

    def first(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same on the first batch, where the cache is opened for the pairs."""
        cached = self._cached
        if cached is None:
            self(student, args, kwargs)
            return
        more = "" if self._logits is None else self._logits.identity

        def run(*inputs: Any) -> None:
            assert self._pairing is not None
            cached.first(inputs, self._pairing, self.readers, more)

        self._run_cached(student, args, kwargs, run)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_cached(
        self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., None]
    ) -> None:
        """The tables of a cache are no tensors: compiled code is left for it."""
        self._make_ready(student)
        self._run(student, self.teacher.inputs_for(args, kwargs), run)

    def _make_ready(self, student: nn.Module) -> None:
        hooked = self.teacher.module
        self.prepare(student)
        if self.teacher.module is not hooked:  # a copy in another type has no hooks yet
            assert self._pairing is not None
            self.watch(self._pairing)

    def _run(self, student: nn.Module, inputs: Inputs, run: Callable[..., Any]) -> Any:
        """Call ``run`` with the inputs; its errors name the teacher and what to do."""
        if torch.compiler.is_compiling():
            return run(*inputs)
        try:
            return run(*inputs)
        except Exception as error:
            root = "" if self._pairing is None else self._pairing.student.root
            failed = teacher_failed(error, self.teacher.source, inputs, student, root)
            if failed is error:
                raise
            raise failed from error

    def _read_logits(self, output: Any) -> None:
        if self._logits is not None and self._recorder.current is not None:
            self._logits.read_teacher(output, self._recorder.current)


def _first_parameter(student: nn.Module) -> nn.Parameter | None:
    """The first one of floating point."""
    return next((parameter for parameter in student.parameters() if parameter.is_floating_point()), None)
