"""A student with hooks, and the teacher that runs on its inputs. ``pair_choice.py`` has its first forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.pairs import LayerOptions, LayerPair
from lightning_otrt.reading.containers import tensors_in
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.hooks.recorder import Recorder
from lightning_otrt.reading.hooks.views import (
    ConstantTermError,
    Matched,
    NeuronCounts,
    NoTermError,
    View,
    check_graphs,
    matched_neurons,
    trained_views,
)
from lightning_otrt.reading.pairing import Pairing, check_layers
from lightning_otrt.reading.student_root.gradient_reach import describe_unreached
from lightning_otrt.reading.student_root.reach import describe_frozen
from lightning_otrt.reading.student_root.search import RootSearch
from lightning_otrt.reading.torch_internals import is_compiled, unwrapped
from lightning_otrt.reading.traced.network_call import NetworkCall
from lightning_otrt.reading.warnings.first_step import FirstStep
from lightning_otrt.teacher.cache.cached_run import CacheUse
from lightning_otrt.teacher.frozen.frozen_teacher import Teacher
from lightning_otrt.teacher.logit_recording import LogitRecording, MatchedLogits
from lightning_otrt.teacher.pair_choice import ChoosePairs, trace_and_pair
from lightning_otrt.teacher.teacher_run import TeacherRun
from lightning_otrt.teacher.watched_layers import WatchedLayers

__all__ = ["Attachment"]

#: Calls whose graphs are checked: an inner step that frees them does so from the start.
GRAPH_CHECKS = 3


class Attachment:
    """Hooks on one student, which run the teacher and record the neurons of both.

    In the first recorded forward, which shows the root of the student, both networks are traced to choose the pairs of
    layers.

    Args:
        teacher: The teacher.
        options: What the user passed about layers.
        settle: Called on the first forward with a function that chooses the pairs. It returns the pairs to record.
        cache: Where readings of the teacher are kept; None: it runs on each batch.
        logits: Reads the logits of both networks, where they are distilled.
    """

    def __init__(
        self,
        teacher: Teacher,
        options: LayerOptions,
        settle: Callable[[ChoosePairs], Pairing],
        cache: CacheUse | None = None,
        logits: LogitRecording | None = None,
    ) -> None:
        self.teacher = teacher
        self._options, self._settle = options, settle
        self._logits = logits
        #: The attached student.
        self.student: nn.Module | None = None
        #: The resolved pairs with the traces of both networks. They stay when the student is detached.
        self.pairing: Pairing | None = None
        self._counts: list[NeuronCounts] = []
        #: For each pair, the rows of its student layer for each sample.
        self._rows: list[int] = []
        self._graph_checks = 0
        self._is_compiled = False
        self._is_reach_known = False
        self._recorder = Recorder(self._on_forward, None if logits is None else logits.read_student)
        #: The module of the student whose inputs the teacher gets too.
        self.root = RootSearch(options.layers, options.student_root, self._recorder, distills=logits is not None)
        self._teacher_run = TeacherRun(teacher, self._recorder, options.grid, cache, logits)
        self._layers = WatchedLayers(self._recorder, self._teacher_run, options.grid, logits)
        self._guard = InputGuard()
        #: What is compared in the first step; None after it.
        self._first_step: FirstStep | None = None
        #: Whether the step goes on in which a forward chose the pairs, and whether the teacher ran in that forward.
        self._is_first_step = self._has_first_run = False

    @property
    def views(self) -> list[View]:
        """The forwards recorded since the last :meth:`take`; the list grows with the next forwards."""
        return self._recorder.views

    @property
    def has_root(self) -> bool:
        """Whether a forward of the attached student has shown its root and chosen the pairs."""
        return self.root.name is not None

    @property
    def device(self) -> torch.device | None:
        """Device of the student's first parameter; None without a student or a parameter."""
        parameter = None if self.student is None else next(self.student.parameters(), None)
        return None if parameter is None else parameter.device

    def attach(self, student: nn.Module) -> None:
        """Put hooks on ``student``; :meth:`record` switches them on.

        Raises:
            RuntimeError: If a student is attached already.
            TypeError: If ``student`` is no module.
            ValueError: If a layer name does not exist, or the teacher shares parameters with the student.
        """
        if self.student is not None:
            raise RuntimeError("This RepresentationTransfer is attached already. Detach it first, or use another one.")
        if not isinstance(student, nn.Module):
            raise TypeError(f"Expected the student to be a torch.nn.Module, but got {type(student).__name__}.")
        self.teacher.check_against(student)
        check_layers(self._options.layers, student, self.teacher.module, self._options.student_root)
        self._is_compiled = is_compiled(student)
        if self._is_compiled or is_compiled(self.teacher.module):
            # Code that was compiled before has no hooks in it and would never call ours. This throws away all
            # compiled code of the process, so it is done only if one of the two networks is compiled.
            torch.compiler.reset()
        # The module in a compiled one: compiled code cannot hold the hooks' student under two names.
        self.student = student = unwrapped(student)
        self._guard = InputGuard()
        self._graph_checks = GRAPH_CHECKS
        self._is_reach_known = False
        try:
            self._teacher_run.start(student)
            self.choose_again()
        except BaseException:
            self.detach()
            raise

    def choose_again(self) -> None:
        """Forget what was recorded, and let the next forward choose the root and the pairs."""
        self._recorder.take()
        self._is_first_step = False
        if self.student is not None:
            self.root.start(self.student)

    def detach(self) -> None:
        """Remove all hooks, and give the teacher back on its device and in its mode."""
        self.forget_student()  # first: a cache that cannot be written must not leave hooks
        self._teacher_run.stop()

    def forget_student(self) -> None:
        """Remove all hooks, and leave the teacher as it is."""
        self.root.stop()
        self._forget_first_step()
        self._recorder.remove()
        if self._logits is not None:
            self._logits.forget_modules()
        self._layers.forget()
        self.student = None

    def record(self, on: bool, *, pairs: bool = True) -> None:
        """Let the hooks record or not.

        Called where that changes, not before each forward: compiled code is compiled anew for each value of the flag.

        Args:
            on: Whether forwards are recorded.
            pairs: Whether the layers of the pairs are read, and not the logits alone.
        """
        self._recorder.switch(on, pairs=pairs)
        self.root.hold_compiled_code(on)

    def leave_forward(self) -> None:
        """Forget a forward that was interrupted: a KeyboardInterrupt calls no hook at its end."""
        self._recorder.leave()

    def take(self) -> list[View]:
        """The forwards recorded since the last call: those with gradient, or all where none has one."""
        if self._first_step is not None:
            self._first_step.end()
            self._first_step = None
        self._is_first_step = False
        return trained_views(self._recorder.take())

    @property
    def note(self) -> str:
        """What is distilled, for the log; empty if nothing is."""
        return "" if self._logits is None else self._logits.note

    @property
    def teacher_output(self) -> Any:
        """What the teacher returned in the newest forward of the student.

        Raises:
            RuntimeError: If it did not run in that forward.
        """
        if self._recorder.teacher_output is None:
            raise RuntimeError(
                "There is no output of the teacher for the last forward of the student: `teacher_output` is that of a "
                "recorded training forward, from its start until `loss` takes it. It is not there before the first "
                "forward, in steps in which the schedule or all weights are 0, in validation, inside `no_grad` or "
                "`transfer.paused()`, after `loss`, and with `teacher_cache`, which keeps what the terms need alone."
            )
        return self._recorder.teacher_output[0]

    def neurons(self, views: list[View]) -> Matched:
        """The neurons of each view and pair.

        Raises:
            NoTermError: If there are none.
        """
        assert self.pairing is not None
        try:
            matched = matched_neurons(views, self.pairing.pairs, self._counts, self.device)
        except ConstantTermError:
            assert self.student is not None
            frozen = describe_frozen(self.student, self.pairing.student, self.pairing.pairs)
            if not frozen:
                raise
            raise NoTermError(frozen) from None
        if torch.compiler.is_compiling():
            return matched
        self._layers.follow_replaced(matched.absent)
        return matched

    def unreached(self, views: Sequence[View]) -> str:
        """What the term does not train although it lies before the recorded layers; told once, empty for nothing."""
        if self._is_reach_known or self.pairing is None or self.student is None or torch.compiler.is_compiling():
            return ""
        readings = [*chain.from_iterable(calls for view in views for calls in (*view.student.values(), view.features))]
        self._is_reach_known = bool(readings)
        return describe_unreached(self.student, self.pairing.student, self.pairing.pairs, readings)

    def logits(self, views: list[View]) -> MatchedLogits:
        """The logits of each view.

        Raises:
            NoTermError: If there are none.
        """
        assert self._logits is not None
        return self._logits.matched(views)

    def watch_distillation(self, term: Tensor) -> None:
        """Look at the gradient of the distillation, beside that of the logits."""
        assert self._logits is not None
        self._logits.watch_term(term)

    def reset(self) -> None:
        """Look again at the gradient of the task, as at the start of a training run."""
        if self._logits is not None:
            self._logits.reset()

    def samples(self, views: Sequence[View]) -> int:
        """Number of samples in the views: a layer may have several rows for each, such as frames or windows."""
        if self.pairing is None:
            return 0
        return sum(view.samples(self._rows) for view in views)

    def check_task(self) -> None:
        """Warn once where the distillation of logits does not suit the task, as far as earlier calls show it."""
        if self._logits is not None:
            self._logits.check_task()

    def check_views(self, views: list[View]) -> None:
        """Look at the forwards of a call before they are used.

        Raises:
            NoTermError: If there are none, or a backward pass has gone through one.
        """
        if not views or self.pairing is None:
            raise NoTermError(self.root.why_no_view())
        if self._graph_checks:
            check_graphs(views)
            self._graph_checks -= 1

    def _on_forward(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """A module that may be the root starts a forward: choose the pairs if need be, and run the teacher."""
        assert self.student is not None
        if self.root.serves_another(name, (args, kwargs)):
            return False
        if self.root.name is not None and not self._has_first_failed():
            self.root.note_forward()
            # In containers of their own: the teacher must not change those of the student.
            with self._guard.later_forward((args, kwargs)) as (own_args, own_kwargs):
                self._teacher_run(self.student, own_args, own_kwargs)
            return True
        if not self.root.is_possible(name, self.teacher.module):
            return False
        # Networks that write to their inputs show it here, where the batch can still be restored. This happens twice:
        # after the traces, too, since the teacher has to get what the student gets.
        with self._guard.first_forward((args, kwargs)) as (own_args, own_kwargs):
            try:
                self._resolve(self.student, name, own_args, own_kwargs)
            except Exception as error:
                raise self.root.explained(error, name) from error
        run = self._teacher_run if self._has_first_run else self._teacher_run.first
        with self._guard.first_forward((args, kwargs)) as (own_args, own_kwargs):
            run(self.student, own_args, own_kwargs)
        self._has_first_run = True
        return True

    def _resolve(self, student: nn.Module, root: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Choose the pairs from one traced forward of each network, and put the hooks on their layers."""
        call = NetworkCall(student, (args, kwargs), root, self.root.method)
        before = self.pairing if self._is_first_step else None
        self._forget_first_step()
        self._first_step = first_step = FirstStep()

        def choose(known: tuple[LayerPair, ...] | None) -> Pairing:
            with self._recorder.switched_off():
                self._teacher_run.prepare(student)
                with self._teacher_run.learning() if before is None else nullcontext():
                    pairing = trace_and_pair(
                        self._options,
                        known,
                        call,
                        self.teacher,
                        self._guard,
                        first_step.input,
                        distils=self._logits is not None,
                        compiled=self._is_compiled,
                    )
                if self._logits is not None:
                    self._logits.settle(pairing, student, self.teacher.module)
                return pairing

        if before is None:
            self.pairing, self._has_first_run = self._settle(choose), False
        else:  # no new choice: other processes, which have chosen with this one, may not fail
            self.pairing = replace(choose(before.pairs), pairs=before.pairs, plans=before.plans)
        self._counts, self._rows = self.pairing.neuron_counts(), self.pairing.rows_of_a_sample()
        self._layers.watch_student(student, self.pairing)
        self.root.found(self.pairing.student.root, tensors_in((args, kwargs)))
        self._is_first_step = True
        self._teacher_run.watch(self.pairing)
        recorded = [*self._layers.readers.values()]
        if self._logits is not None and self._logits.features is not None:
            recorded.append(self._logits.features)
        first_step.compare_next(self.pairing.student, ((layer.name, layer.module) for layer in recorded))

    def _has_first_failed(self) -> bool:
        """Whether the forward that chose the pairs raised an error, as for want of memory, and another one is tried.

        The networks are then traced again: what was noted of the first batch does not belong to the next one.
        """
        return self._is_first_step and not torch.compiler.is_compiling() and not self._recorder.views

    def _forget_first_step(self) -> None:
        if self._first_step is not None:
            self._first_step.forget()
        self._first_step = None
