"""The choice of the pairs of layers in the first forward of a student, from traces of both networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from torch import nn

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import LayerPair, LayerSpec
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.hooks.view_hooks import OpenView
from lightning_otrt.reading.pairing import Inputs, Pairing, pair_layers
from lightning_otrt.reading.student_root.rules import find_teacher_root, same_method
from lightning_otrt.reading.torch_internals import without_earlier_pre_hooks
from lightning_otrt.reading.traced.arguments import positions_by_name
from lightning_otrt.reading.warnings.samples import warn_of_other_axes
from lightning_otrt.reading.warnings.train_only import FirstInput
from lightning_otrt.teacher.frozen.frozen_teacher import Teacher
from lightning_otrt.teacher.frozen.past_states import PastStates
from lightning_otrt.teacher.frozen.teacher_call import TeacherCall

__all__ = ["ChoosePairs", "trace_and_pair"]

#: Traces both networks and chooses pairs of layers, or takes those that are given.
ChoosePairs: TypeAlias = Callable[[tuple[LayerPair, ...] | None], Pairing]


def trace_and_pair(
    layers: LayerSpec,
    known: tuple[LayerPair, ...] | None,
    student: nn.Module,
    root: str,
    inputs: Inputs,
    teacher: Teacher,
    guard: InputGuard,
    first_input: FirstInput,
    *,
    method: str,
    plan: str,
    grid: int | None,
    compiled: bool,
) -> Pairing:
    """Find what of the teacher runs on which inputs, trace one forward of each network, and choose the pairs.

    Args:
        layers: What the user passed as ``layers``.
        known: See :func:`~lightning_otrt.reading.pairing.pair_layers`.
        student: The student.
        root: Name of its module whose inputs the teacher gets too.
        inputs: Arguments of that module.
        teacher: The teacher, on the student's device. It is told how it is called.
        guard: Copies the inputs of the student's trace.
        first_input: Notes what the first layer gets in the trace.
        method: Method of the student's root that is called in place of its forward.
        plan: See :func:`~lightning_otrt.reading.pairing.pair_layers`.
        grid: See :func:`~lightning_otrt.reading.pairing.pair_layers`.
        compiled: Whether the student runs in compiled code after this forward.
    """
    module, source = teacher.module, named_layers(student)[root]
    teacher_root = find_teacher_root(layers, student, root, module)
    target = named_layers(module)[teacher_root]
    teacher_method = "" if teacher.has_inputs else same_method(target, method)
    names = positions_by_name(source, method or "forward", target, teacher_method or "forward")
    states = PastStates(source, method or "forward", *inputs, None if compiled else target)
    teacher.call = TeacherCall(teacher_root, teacher_method, names, states)
    # Each forward gets a copy of its own: both networks may change what they are given.
    own = guard.copied(inputs)
    # Clones, since the trace of the student may write to its inputs.
    given = teacher.inputs_for(*InputGuard(clones=True).copied(inputs))
    states.zeros.may_wait = False
    # What is recorded has gone through the pre-hooks of users once.
    with without_earlier_pre_hooks(source, OpenView), first_input.noted(student, root):
        pairing = pair_layers(
            layers,
            student,
            root,
            own,
            module,
            given,
            known,
            method=method,
            teacher_root=teacher_root,
            teacher_method=teacher_method,
            plan=plan,
            grid=grid,
        )
    teacher.call = replace(teacher.call, draws_random=pairing.teacher.draws_random)
    if not teacher.has_inputs:
        warn_of_other_axes(pairing.student, pairing.teacher)
    return pairing
