"""The recorded layers of a student, and the hooks of both networks where other modules take the place of layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_otrt.notices import warn
from lightning_otrt.reading.hooks.recorder import Readers, Recorder
from lightning_otrt.reading.pairing import Pairing
from lightning_otrt.teacher.logit_recording import LogitRecording
from lightning_otrt.teacher.replaced import Places, moved_pairs, places_of, replaced_layers
from lightning_otrt.teacher.teacher_run import TeacherRun

__all__ = ["WatchedLayers"]


class WatchedLayers:
    """Keeps the hooks on the layers of the pairs, also where their modules are replaced.

    Args:
        recorder: Its hooks read the student's layers.
        teacher_run: Puts hooks on the teacher's layers.
        grid: Positions kept along each axis of a feature map.
        logits: Reads the logits of both networks, where they are distilled.
    """

    def __init__(
        self, recorder: Recorder, teacher_run: TeacherRun, grid: int | None, logits: LogitRecording | None
    ) -> None:
        self._recorder, self._teacher_run = recorder, teacher_run
        self._grid, self._logits = grid, logits
        self._student: nn.Module | None = None
        self._pairing: Pairing | None = None
        #: What is recorded of the student's layers.
        self.readers: Readers = {}
        #: Where they are.
        self._places: Places = {}

    def watch_student(self, student: nn.Module, pairing: Pairing) -> None:
        """Put hooks on the student's layers of these pairs."""
        self._student, self._pairing = student, pairing
        self.readers, logits = pairing.readers("student", student, self._grid), self._logits
        self._places = places_of(student, self.readers)
        if logits is None:
            self._recorder.watch_student(self.readers)
        else:
            self._recorder.watch_student(self.readers, logits.masks("student"), logits.features)

    def forget(self) -> None:
        """Let go of the student and of its layers. The hooks are the recorder's, which removes them."""
        self._student, self._pairing = None, None
        self.readers, self._places = {}, {}

    def follow_replaced(self, absent: Iterable[int]) -> None:
        """Put the hooks of layers on the modules that took their place, and say so.

        Args:
            absent: Numbers of the pairs of which a layer did not run.

        Raises:
            ValueError: If a network has no module of that name any more.
        """
        suspects = sorted({*absent, *moved_pairs(self._places, self._teacher_run.places)})
        if not suspects:
            return
        assert self._student is not None
        assert self._pairing is not None
        replaced = replaced_layers("student", self._student, self.readers, suspects)
        if replaced:
            self.watch_student(self._student, self._pairing)
        of_teacher = replaced_layers("teacher", self._teacher_run.teacher.module, self._teacher_run.readers, suspects)
        if of_teacher:
            self._teacher_run.watch(self._pairing)
        for side, names in (("student", replaced), ("teacher", of_teacher)):
            if names:
                warn(
                    f"Other modules took the place of the {side} layers {names} since the last step. This step did not "
                    "read them; they are recorded from the next forward. Their plans go on from the old ones.",
                )
