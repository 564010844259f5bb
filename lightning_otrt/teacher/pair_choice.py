"""The choice of the pairs of layers in the first forward of a student, from traces of both networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import LayerOptions, LayerPair
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.hooks.view_hooks import OpenView
from lightning_otrt.reading.pairing import Pairing, pair_layers
from lightning_otrt.reading.student_root.rules import find_teacher_root, same_method
from lightning_otrt.reading.student_root.whole import does_more_than_its_part, may_run_whole
from lightning_otrt.reading.torch_internals import without_earlier_pre_hooks
from lightning_otrt.reading.traced.arguments import positions_by_name
from lightning_otrt.reading.traced.network_call import NetworkCall
from lightning_otrt.reading.warnings.samples import warn_of_other_axes
from lightning_otrt.reading.warnings.train_only import FirstInput
from lightning_otrt.teacher.frozen.frozen_teacher import Teacher
from lightning_otrt.teacher.frozen.past_states import PastStates
from lightning_otrt.teacher.frozen.teacher_call import TeacherCall

__all__ = ["ChoosePairs", "trace_and_pair"]

#: Traces both networks and chooses pairs of layers, or takes those that are given.
ChoosePairs: TypeAlias = Callable[[tuple[LayerPair, ...] | None], Pairing]


def trace_and_pair(
    options: LayerOptions,
    known: tuple[LayerPair, ...] | None,
    student: NetworkCall,
    teacher: Teacher,
    guard: InputGuard,
    first_input: FirstInput,
    *,
    distils: bool,
    compiled: bool,
) -> Pairing:
    """Find what of the teacher runs on which inputs, trace one forward of each network, and choose the pairs.

    Args:
        options: What the user passed.
        known: See :func:`~lightning_otrt.reading.pairing.pair_layers`.
        student: The call whose inputs the teacher gets too.
        teacher: The teacher, on the student's device. It is told how it is called.
        guard: Copies the inputs of the student's trace.
        first_input: Notes what the first layer gets in the trace.
        distils: Whether logits are distilled.
        compiled: Whether the student runs in compiled code after this forward.
    """
    source, module = student.module, teacher.module
    # Each forward gets a copy of its own: both networks may change what they are given.
    own = replace(student, inputs=guard.copied(student.inputs))
    part = find_teacher_root(options.layers, student.model, student.root, module)
    if part and may_run_whole(options.layers, student, module, part):
        whole = _call(teacher, student, "", compiled=compiled)
        part = "" if does_more_than_its_part(whole, part, distils=distils) else part
    of_teacher = _call(teacher, student, part, compiled=compiled)
    states = teacher.call.past_states
    states.zeros.may_wait = False
    # What is recorded has gone through the pre-hooks of users once.
    with without_earlier_pre_hooks(source, OpenView), first_input.noted(student.model, student.root):
        pairing = pair_layers(options.layers, own, of_teacher, known, plan=options.plan, grid=options.grid)
    teacher.call = replace(teacher.call, draws_random=pairing.teacher.draws_random)
    if not teacher.has_inputs:
        warn_of_other_axes(pairing.student, pairing.teacher)
    return pairing


def _call(teacher: Teacher, student: NetworkCall, root: str, *, compiled: bool) -> NetworkCall:
    """Tell the teacher that this part of it runs on the inputs of the student, and how; that call."""
    source, method = student.module, student.method or "forward"
    target = named_layers(teacher.module)[root]
    teacher_method = "" if teacher.has_inputs else same_method(target, student.method)
    names = positions_by_name(source, method, target, teacher_method or "forward")
    states = PastStates(source, method, *student.inputs, None if compiled else target)
    # A method is called on the module that has it, and not on what `torch.compile` has put around that.
    path = ""
    if root or teacher_method:
        path = next(name for name, inner in teacher.module.named_modules() if inner is target)
    teacher.call = TeacherCall(root, path, teacher_method, names, states)
    given = teacher.inputs_for(*InputGuard(clones=True).copied(student.inputs))
    return NetworkCall(teacher.module, given, root, teacher_method)
