"""Transport distances over a whole validation set, from the forwards that the validation loop runs anyway."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_otrt.analysis.metric import NeuronTransportDistance
from lightning_otrt.layers.names import named_layers
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.hooks.own_hook import FunctionHook
from lightning_otrt.reading.hooks.recorder import Recorder
from lightning_otrt.reading.hooks.view_hooks import ViewAroundMethod
from lightning_otrt.reading.neurons.positions import match_positions
from lightning_otrt.reading.student_root.rules import split_root
from lightning_otrt.reading.torch_internals import add_forward_hook, add_forward_pre_hook
from lightning_otrt.transfer import RepresentationTransfer

__all__ = ["ValidationDistances"]

#: In place of the number of observations, which all processes add up, it makes a value NaN on each of them.
_MISSING = -(2.0**62)


class ValidationDistances:
    """Updates one metric for each pair at every forward of the student's root, until :meth:`close`.

    It has hooks of its own, because the recorder of the training term ignores forwards without gradient. An error in a
    hook does not stop the validation: it stops the recording, and is stored as :attr:`error`. Then all values are NaN,
    on all processes, since those of a part of the data would be taken for those of all.

    Args:
        transfer: The transfer, attached to ``student``, with its pairs chosen. Its cost has to be additive.
        student: The student.
    """

    def __init__(self, transfer: RepresentationTransfer, student: nn.Module) -> None:
        self.transfer, self._student = transfer, student
        #: Why the recording stopped, or why a distance is NaN.
        self.error: Exception | None = None
        #: Whether the recording has stopped on this process.
        self.has_stopped = False
        self.metrics = self._make_metrics()
        self._recorder = Recorder(lambda *_: False)
        pairing = transfer.pairing
        assert pairing is not None
        self._recorder.watch_student(pairing.readers("student", student, transfer.grid))
        self._recorder.watch_teacher(pairing.readers("teacher", transfer.teacher.module, transfer.grid))
        #: Forwards of the root that were seen.
        self.forwards = 0
        root = named_layers(student)[pairing.student.root]
        method = split_root(transfer.student_root)[1]
        self._handles: list[RemovableHandle | ViewAroundMethod] = []
        if method:
            self._handles.append(ViewAroundMethod(root, method, self._open, self._record))
        else:
            self._handles.append(add_forward_pre_hook(root, FunctionHook(self._open), with_kwargs=True))
            self._handles.append(add_forward_hook(root, FunctionHook(self._record), always_call=True))

    def compute(self) -> list[Tensor]:
        """The distance of each pair over all forwards of all processes. All processes have to call it.

        It is NaN for a pair without data, and for a plan that is not found, whose error is stored as :attr:`error`.
        """
        if self.has_stopped:
            for metric in self.metrics:
                metric.sums = torch.full_like(metric.sums, _MISSING)
        return [self._distance(metric) for metric in self.metrics]

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._recorder.remove()

    def _distance(self, metric: NeuronTransportDistance) -> Tensor:
        try:
            return metric.compute()
        except RuntimeError as error:
            self.error = error
            return metric.sums.new_tensor(math.nan)

    def _make_metrics(self) -> list[NeuronTransportDistance]:
        """A metric for each pair, from what the traced forward showed: steps with a term are not needed."""
        transfer, pairing = self.transfer, self.transfer.pairing
        assert pairing is not None
        cost, device = transfer.ground_cost.name, next(self._student.parameters()).device
        metrics = []
        for number, (counts, kind) in enumerate(zip(pairing.neuron_counts(), transfer.engine.plans, strict=True)):
            metric = NeuronTransportDistance(
                counts.student,
                counts.teacher,
                cost=cost,
                plan="sinkhorn" if kind == "static" else kind,
                epsilon=transfer.epsilon,
                seed=transfer.seed + number,  # as the engine: each pair has its own random plan
            )
            # Layers of one network may lie on several devices.
            known = transfer.distances[number : number + 1]
            metrics.append(metric.to(known[0].value.device if known else device))
        return metrics

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.forwards += 1
        if self.has_stopped or self._recorder.current is not None:
            return
        teacher = self.transfer.teacher
        try:
            with torch.no_grad():
                own = InputGuard(clones=True).copied((args, kwargs))  # the teacher may write to them
                teacher_args, teacher_kwargs = teacher.inputs_for(*own)
                self._recorder.open()
                # The mask hooks ran before the view was open.
                self._recorder.note_masks(module, args, kwargs)
                teacher.run_recorded(self._recorder, teacher_args, teacher_kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            self._fail(error)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        view = self._recorder.close()
        if view is None or output is None:  # None: the forward raised an error
            return
        try:
            with torch.no_grad():
                for index, (metric, pair) in enumerate(zip(self.metrics, self.transfer.pairs, strict=True)):
                    calls = view.student.get(index, []), view.teacher.get(index, [])
                    where = f"{pair.student!r} -> {pair.teacher!r}"
                    if [len(side) for side in calls] != [1, 1]:
                        raise ValueError(
                            f"{where}: the layers ran {len(calls[0])} and {len(calls[1])} times in one forward, but a "
                            "distance needs one call of each."
                        )
                    y, x = match_positions(calls[0][0], calls[1][0], where)
                    if metric.num_student_neurons == len(y) and metric.num_teacher_neurons == len(x):
                        metric.update(y, x)
        except (TypeError, ValueError, RuntimeError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.error, self.has_stopped = error, True
        self._recorder.close()
