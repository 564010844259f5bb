"""The logits of student and teacher in the forwards of a step, for their distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lightning_otrt.distillation import LogitDistillation
from lightning_otrt.layers.mask_sources import MaskSource
from lightning_otrt.notices import warn
from lightning_otrt.reading.hooks.recorder import RecordedLayer
from lightning_otrt.reading.hooks.views import NoTermError, View
from lightning_otrt.reading.neurons.positions import match_positions
from lightning_otrt.reading.neurons.reader import NeuronReader
from lightning_otrt.reading.pairing import Pairing
from lightning_otrt.reading.torch_internals import version_of
from lightning_otrt.teacher.logit_choice import LogitChoice, choose_logits, teacher_reader
from lightning_otrt.teacher.logit_makers import LogitMakers
from lightning_otrt.teacher.task_gradient import TaskGradient
from lightning_otrt.transport.soft_targets import as_two_classes, logit_neurons

__all__ = ["LogitRecording", "MatchedLogits"]


class MatchedLogits(NamedTuple):
    """The logits of the views of a call.

    Attributes:
        is_regression: Whether the teacher's logits are regressed, because the classes are others.
        views: For each view ``(student, teacher, mask)``: logits of one shape ``(B, K, *positions)`` with the mask of
            their positions or None; for a regression neurons ``(N, n)`` of the student, centred logits ``(K, n)`` of
            the teacher, and None.
    """

    is_regression: bool
    views: list[tuple[Tensor, Tensor, Tensor | None]]


class LogitRecording:
    """Reads the logits of both networks, and brings them to one form.

    Args:
        option: What the user passed.
        grid: Positions kept along each axis of a map; for a regression.
    """

    def __init__(self, option: LogitDistillation, grid: int | None) -> None:
        self.option, self.grid = option, grid
        self._choice = LogitChoice()
        #: Shape of the student's logits in the trace, until the training forward of that batch.
        self._traced: tuple[int, ...] | None = None
        #: What makes them, until then.
        self._makers: LogitMakers | None = None
        self._task = TaskGradient()

    @property
    def features(self) -> RecordedLayer | None:
        """What to record of the student for a regression."""
        return self._choice.features

    @property
    def regression(self) -> dict[str, Any] | None:
        """What is regressed on what, plain values by what they are; None where nothing is. It outlives the modules."""
        return self._choice.regression

    @property
    def note(self) -> str:
        """What is compared, for the log."""
        return self._choice.note

    def settle(self, pairing: Pairing, student: nn.Module, teacher: nn.Module) -> None:
        """Take from the traces what to read, and how.

        Raises:
            ValueError: If the layer that the user named for a regression does not exist or cannot be read, or if both
                networks have the same classes in another order.
        """
        self.forget_modules()
        self._choice = choose_logits(self.option, self.grid, pairing, student, teacher)
        traced = self._choice.traced
        self._traced = None if traced is None else traced.shape
        self._makers = None if traced is None else LogitMakers(student, pairing.student, traced)

    def reset(self) -> None:
        """Look again at the gradient of the task, which may be another one."""
        self._task = TaskGradient()

    def use_teacher(self, pairing: Pairing, teacher: nn.Module) -> None:
        """Read from this module, where the teacher runs as another copy than before."""
        self._choice = replace(self._choice, teacher=teacher_reader(self.option, pairing, teacher))

    def forget_modules(self) -> None:
        """Let go of the modules of both networks. :meth:`settle` finds them again."""
        if self._makers is not None:
            self._makers.remove()
        self._makers = None
        self._choice = self._choice.without_modules()

    @property
    def identity(self) -> str:
        """What is read of the teacher's output, in words that are equal for equal readings."""
        reader = self._choice.teacher
        assert reader is not None
        masks = [source for source, _ in reader.masks]
        grid = self.grid if self._choice.is_regression else "whole"
        return f"logits {reader.select!r} {reader.class_axis} {reader.batch_axis} {masks!r} {grid}"

    def masks(self, side: str) -> tuple[tuple[MaskSource, nn.Module], ...]:
        """The sources of the masks of the logits of one side, with the modules that get them."""
        reader = self._choice.student if side == "student" else self._choice.teacher
        return () if reader is None else reader.masks

    def read_student(self, output: Any, view: View) -> None:
        """Keep the student's logits in a view."""
        if self._choice.student is not None:
            tensor, axis = self._choice.student.returned(output)
            view.output = tensor, axis, None if torch.compiler.is_compiling() else version_of(tensor)
            view.logits, view.logit_mask = self._choice.student(output, view.masks)
            traced, self._traced = self._traced, None
            makers, self._makers = self._makers, None
            difference = "" if makers is None else makers.take_difference(tensor)
            if traced is not None and sorted(traced) != sorted(view.logits.shape):
                warn(
                    f"The student's logits have the shape {tuple(view.logits.shape)} as (batch, classes, *positions), "
                    f"but {traced} in evaluation mode on the same batch, as where auxiliary outputs come first in "
                    "training. They are compared with the teacher's, which are those of evaluation. Name those that "
                    "belong to them: distillation=LogitDistillation(select=(student, teacher)).",
                )
            elif difference:
                warn(
                    f"The student's logits are {difference}. They are compared with the teacher's, which runs in "
                    "evaluation mode: logits are then compared with probabilities, or those of one head with those of "
                    "another. Return the same in both modes, or name those that belong together: "
                    "distillation=LogitDistillation(select=(student, teacher)).",
                )

    def read_teacher(self, output: Any, view: View) -> None:
        """Keep the teacher's logits in a view; for a regression they are pooled at once."""
        if self._choice.teacher is None:
            return
        logits, mask = self._choice.teacher(output, view.masks)
        if self._choice.is_regression:
            logits, mask = self._pooled(logits, mask), None
        view.teacher_logits, view.teacher_logit_mask = logits, mask
        view.teacher_version = None if torch.compiler.is_compiling() else version_of(logits)

    def matched(self, views: Sequence[View]) -> MatchedLogits:
        """The logits of each view in one form.

        Raises:
            NoTermError: If there are no logits in a view, or they do not depend on the student's parameters.
            ValueError: If the shapes of student and teacher do not fit.
        """
        found = [self._of_view(view) for view in views]
        if not any(student.requires_grad for _, (student, _, _) in found):
            what = "output does" if not found[0][0] or self.features is None else f"layer {self.features.name!r} does"
            raise NoTermError(
                f"The distillation of logits is constant: the student's {what} not depend on any parameter that "
                "requires a gradient. Unfreeze its layers, or check for `no_grad` and `detach`."
            )
        if not found[0][0] and self.option.activation is None and not self._choice.is_matched:
            outputs = [view.output for view in views if view.output is not None]
            # Code that writes to the logits in place has a gradient of its own.
            self._task.watch([(it, axis) for it, axis, version in outputs if version in (None, version_of(it))])
        return MatchedLogits(found[0][0], [triple for _, triple in found])

    def watch_term(self, term: Tensor) -> None:
        """Let the look at the gradient of the task know that of the term."""
        self._task.watch_term(term, self.option.temperature)

    def check_task(self) -> None:
        """Warn once if softmaxes are compared, and the gradient of an earlier call shows that the task trains none."""
        self._task.check()

    def _of_view(self, view: View) -> tuple[bool, tuple[Tensor, Tensor, Tensor | None]]:
        student, teacher = view.logits, view.teacher_logits
        if student is None or teacher is None:
            raise NoTermError(
                "No logits were recorded in a forward of the student. Its output is recorded where its root is called "
                "as a module; code that was compiled before the transfer was attached does not tell it."
            )
        if view.teacher_version not in (None, version_of(teacher)):
            raise NoTermError(
                "Code wrote to the teacher's logits in place after its forward, so that the distillation would be that "
                "of other logits. Change a copy: `transfer.teacher_output.clone()`."
            )
        where = "Distillation of logits"
        shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)} as (batch, classes, *positions)"
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(
                f"{where}: the batch sizes differ ({shapes}). Teacher and student must see the same samples. Check "
                "`teacher_inputs`."
            )
        if self.option.features is not None or student.shape[1] != teacher.shape[1]:
            return True, self._regressed(view, student, teacher)
        by_label = self.option.activation == "sigmoid"
        if student.shape[1] == 1 and not by_label:
            raise ValueError(
                f"{where}: both networks have a single output ({shapes}), and softened probabilities of one class are "
                "always 1. For a binary cross-entropy pass LogitDistillation(activation='sigmoid'); otherwise regress "
                "the teacher's output on a layer of the student with LogitDistillation(features='name of the layer')."
            )
        mask = view.teacher_logit_mask if view.logit_mask is None else view.logit_mask
        if student.shape != teacher.shape:
            if student.dim() != 4 or teacher.dim() != 4:
                raise ValueError(
                    f"{where}: the positions differ ({shapes}) and cannot be matched. Maps (B, K, H, W) are resized; "
                    "others have to agree. Check `teacher_inputs`, or leave the distillation out."
                )
            size = student.shape[2:]
            teacher = interpolate(teacher, size, mode="bilinear", align_corners=False, antialias=True)
        if by_label:
            mask = None if mask is None else mask.unsqueeze(1).expand(student.shape)
            student, teacher = as_two_classes(student), as_two_classes(teacher)
        return False, (student, teacher, mask)

    def _regressed(self, view: View, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, None]:
        calls = view.features
        if self.features is None:
            raise ValueError(
                f"The student has {student.shape[1]} classes and the teacher {teacher.shape[1]}, so that the teacher's "
                "logits are regressed on what enters the student's last linear layer. None was found. Name the layer "
                "whose output is to be used, with LogitDistillation(features='name') or 'name:input'."
            )
        if len(calls) != 1:
            raise NoTermError(
                f"The student layer {self.features.name!r}, on which the teacher's logits are regressed, ran "
                f"{len(calls)} times in this forward, and not once. Name another one with "
                "LogitDistillation(features='name')."
            )
        if not self._choice.is_regression:
            teacher = self._pooled(teacher, view.teacher_logit_mask)
        y, x = match_positions(calls[0], teacher, f"{self.features.name!r} -> the teacher's logits")
        is_free = len(x) > 1 and self.option.activation != "sigmoid"
        return y, logit_neurons(x, centred=is_free), None

    def _pooled(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        teacher = self._choice.teacher
        where = "the logits of the teacher" if teacher is None else f"the logits of the {teacher.where}"
        return NeuronReader(layer=where, neuron_axis=1, grid=self.grid)(logits, mask)
