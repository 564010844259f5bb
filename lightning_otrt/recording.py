"""The attached student of a transfer: which of its forwards are recorded, and what was recorded so far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from lightning_otrt.reading.hooks.views import View
from lightning_otrt.reading.pairing import Pairing
from lightning_otrt.teacher.attachment import Attachment
from lightning_otrt.weights import StepWeights, Weights

__all__ = ["RecordedStudent"]


class RecordedStudent:
    """Base of ``RepresentationTransfer``: attaches to a student, and records its forwards where they count.

    Args:
        attachment: The hooks, which are switched on and off here.
        weights: The weights of both terms. They are not asked for where nothing is recorded anyway.
    """

    def __init__(self, attachment: Attachment, weights: StepWeights) -> None:
        self._attachment, self._weights = attachment, weights
        self._is_recording = self._is_choosing = False
        #: What the hooks were last told: whether to record, whether to read the pairs, and whether these were chosen.
        self._switches: tuple[bool, bool, bool] | None = None
        #: Whether the term of the attached student was asked for.
        self._was_asked = False

    @property
    def is_active(self) -> bool:
        """Whether some term counts at the current step, so that forwards are recorded and the teacher runs."""
        return any(self._weights.now())

    @property
    def current_weights(self) -> Weights:
        """The weights of both terms at the current step, a named tuple ``(transport, distillation)``.

        Raises:
            ValueError: If the schedule gives anything but a finite number that is not negative.
            RuntimeError: If the schedule fails.
        """
        return self._weights.now()

    @property
    def last_weights(self) -> Weights:
        """The weights of the last call of :meth:`loss`, which has advanced the step; zeros if there was none."""
        return self._weights.last or Weights(0.0, 0.0)

    @property
    def has_weight(self) -> bool:
        """Whether some term has a weight, whatever the schedule."""
        return any(self._weights.full)

    @property
    def step(self) -> int:
        """The step that the schedule sees; :meth:`loss` advances it."""
        return self._weights.step

    @step.setter
    def step(self, value: int) -> None:
        self._weights.step = value
        self._switch()

    @property
    def student(self) -> nn.Module | None:
        """The attached student."""
        return self._attachment.student

    @property
    def is_attached(self) -> bool:
        """Whether a student is attached."""
        return self._attachment.student is not None

    @property
    def has_chosen(self) -> bool:
        """Whether a forward of the attached student has chosen the pairs of layers."""
        return self._attachment.has_root

    @property
    def pairing(self) -> Pairing | None:
        """The resolved pairs with the traces of both networks; None before the first forward."""
        return self._attachment.pairing

    @property
    def views(self) -> list[View]:
        """The forwards recorded since the last call of :meth:`loss`. The list grows with each of them."""
        return self._attachment.views

    @property
    def has_views(self) -> bool:
        """Whether a forward with gradient was recorded that :meth:`loss` has not taken yet."""
        return any(view.has_gradient or view.is_empty for view in self._attachment.views)

    @property
    def teacher_output(self) -> Any:
        """What the teacher returned in the newest training forward of the student, until :meth:`loss` takes that.

        Raises:
            RuntimeError: If it did not run in the newest forward, as where all weights are 0, and in validation.
        """
        return self._attachment.teacher_output

    def attach(self, student: nn.Module) -> None:
        """Put hooks on ``student``. They record inside :meth:`recording`.

        Raises:
            RuntimeError: If it is attached already.
            TypeError: If the student is no module.
            ValueError: If a layer name does not exist, or the teacher shares parameters with the student.
        """
        self._attachment.attach(student)
        self._was_asked = False

    def detach(self) -> None:
        """Remove all hooks, and give the teacher back on its device and in its mode. Plans and statistics are kept."""
        self._attachment.detach()
        self._switches = None

    def recording(self) -> AbstractContextManager[None]:
        """Record the forwards inside the block. Outside of it the hooks do nothing."""
        return self._switched(True)

    def paused(self) -> AbstractContextManager[None]:
        """Leave forwards inside the block out of the term, such as the inner steps of an attack."""
        return self._switched(False)

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """Let a forward inside the block choose the pairs where all weights are 0, too. Such a forward is not kept."""
        self._is_choosing = True
        self._switch()
        try:
            yield
        finally:
            self._is_choosing = False
            self._switch()
            if not self.is_active:
                self.discard()

    def discard(self) -> None:
        """Forget what was recorded since the last call of :meth:`loss`."""
        self._attachment.take()

    def skip(self) -> None:
        """Form no term of what was recorded, where the weights of the step are 0."""
        self.discard()
        self._weights.of_call()

    @contextmanager
    def _switched(self, on: bool) -> Iterator[None]:
        before, self._is_recording = self._is_recording, on
        try:
            self._switch()  # a schedule may raise an error here
            yield
        finally:
            self._is_recording = before
            if not before:
                self._attachment.leave_forward()
            self._switch()

    def _switch(self) -> None:
        """Switch the hooks on or off, where that changes anything."""
        has_chosen = self._attachment.has_root
        on, pairs = False, True
        if self._is_recording:
            # Where both weights are 0 nothing is recorded, and the teacher does not run.
            weights = self._weights.to_record()
            on, pairs = any(weights) or (self._is_choosing and not has_chosen), weights.transport > 0
        if self._switches != (on, pairs, has_chosen):
            self._switches = on, pairs, has_chosen
            self._attachment.record(on, pairs=pairs)

    def __getstate__(self) -> dict[str, Any]:
        """Without what the hooks were told: the recorder of a copy is told anew."""
        return {**vars(self), "_switches": None, "_is_recording": False, "_is_choosing": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is attached to no student: copies of hooks do nothing."""
        vars(self).update(state)
        self._attachment.forget_student()  # and not `detach`: the teacher is that of the original, which may run
