"""The readings of one forward of the student, and the neurons of each pair of layers, or why there are none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.reading.neurons.positions import match_positions
from lightning_otrt.reading.torch_internals import has_freed_graph

__all__ = [
    "ConstantTermError",
    "Matched",
    "NeuronCounts",
    "NoTermError",
    "View",
    "check_graphs",
    "matched_neurons",
    "trained_views",
    "why_absent",
]


@dataclass
class View:
    """What was recorded in one forward of the student: readings ``(B, C, *positions)``, in order of the calls.

    Attributes:
        root: Name of the module whose forward it was.
        student: Readings of the student by the number of the pair, part of the autograd graph.
        teacher: Readings of the teacher by the number of the pair, without graph.
        features: Readings of the student's layer on which the teacher's logits are regressed.
        masks: The padding masks of the forward by the key of their source: ``(B, T)``, true where a token is valid;
            None where the argument was not given.
        grids: Rows and columns of the maps from which tokens come, by side and layer.
        logits: The student's logits ``(B, K, *positions)``, where they are distilled.
        logit_mask: The mask ``(B, T)`` of the student's logits.
        teacher_logits: The same of the teacher; for a regression pooled as its other readings are.
        teacher_logit_mask: The mask of the teacher's logits.
        output: The tensor that the student returned and ``logits`` is a copy of, the axis of its classes, and its
            version at that time, None in compiled code.
        teacher_version: The version of the teacher's logits when they were read, where it is known.
        reads_pairs: Whether the student's layers of pairs were to be read.
    """

    root: str
    student: dict[int, list[Tensor]] = field(default_factory=dict)
    teacher: dict[int, list[Tensor]] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)
    masks: dict[str, Tensor | None] = field(default_factory=dict)
    grids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    logits: Tensor | None = None
    logit_mask: Tensor | None = None
    teacher_logits: Tensor | None = None
    teacher_logit_mask: Tensor | None = None
    output: tuple[Tensor, int, int | None] | None = None
    teacher_version: int | None = None
    reads_pairs: bool = True

    @property
    def recorded(self) -> list[Tensor]:
        """All that was recorded of the student."""
        readings = [*chain.from_iterable(self.student.values()), *self.features]
        return readings if self.logits is None else [*readings, self.logits]

    @property
    def has_gradient(self) -> bool:
        """Whether it trains the student. It does not where the parameters are frozen for this step, as in GANs."""
        return any(tensor.requires_grad for tensor in self.recorded)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was recorded, as where training skips layers at random."""
        return not self.recorded

    def samples(self, rows: Sequence[int]) -> int:
        """The number of samples, 0 if nothing was recorded.

        Args:
            rows: For each pair, how many rows of its student layer belong to a sample.
        """
        of_pairs = ((len(calls[0]), rows[index]) for index, calls in self.student.items() if calls)
        others = ((len(tensor), 1) for tensor in (self.logits, *self.features) if tensor is not None)
        count, of_a_sample = next(chain(of_pairs, others), (0, 1))
        return math.ceil(count / of_a_sample)


class NoTermError(Exception):
    """No term can be formed in this call; the message says why."""


class ConstantTermError(NoTermError):
    """No recorded layer of the student gets a gradient."""


class NeuronCounts(NamedTuple):
    """The neurons of a pair, as the traced forwards showed them.

    Attributes:
        student: Number of student neurons.
        teacher: Number of teacher neurons.
        dtypes: Types of the readings of both.
    """

    student: int
    teacher: int
    dtypes: tuple[torch.dtype, torch.dtype]

    def none_observed(self, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """Neurons without an observation, ``(N, 0)`` and ``(M, 0)``."""
        sizes = zip((self.student, self.teacher), self.dtypes, strict=True)
        student, teacher = (torch.empty(size, 0, dtype=dtype, device=device) for size, dtype in sizes)
        return student, teacher


class Matched(NamedTuple):
    """What the views of a call give.

    Attributes:
        neurons: For each view, student ``(N, n)`` and teacher ``(M, n)`` of each pair; n is 0 where a pair did not run.
        constant: Names of the student layers that get no gradient.
        absent: For the number of each pair that ran in no view, the layer that did not run.
    """

    neurons: list[list[tuple[Tensor, Tensor]]]
    constant: list[str]
    absent: dict[int, str]


def trained_views(views: list[View]) -> list[View]:
    """The views with gradient, and those in which no layer ran. If there are none, all, so that the error says why."""
    return [view for view in views if view.has_gradient or view.is_empty] or views


def matched_neurons(
    views: Sequence[View],
    pairs: Sequence[LayerPair],
    counts: Sequence[NeuronCounts],
    device: torch.device | None = None,
) -> Matched:
    """The neurons of each view and pair.

    Args:
        views: What was recorded.
        pairs: The pairs.
        counts: The neurons of each pair.
        device: Device of the student.

    Raises:
        NoTermError: If a layer ran more than once, or the weight of the pairs was 0 in a forward.
        ConstantTermError: If all layers ran and none of them gets a gradient.
        ValueError: If the readings of a pair have different positions that cannot be matched.
    """
    if not all(view.reads_pairs for view in views):
        raise NoTermError(
            "The `weight` of the transport term was 0 when the student ran, so its layers were not read, and was set "
            "before `loss`. Set it before the forward of the student."
        )
    neurons: list[list[tuple[Tensor, Tensor]]] = []
    constant, absent, ran = dict(enumerate(pair.student for pair in pairs)), {}, set()
    for view in views:
        neurons.append([])
        for index, pair in enumerate(pairs):
            student, teacher = _only_call(index, pair, view, "student"), _only_call(index, pair, view, "teacher")
            if student is None or teacher is None:
                side, name = ("student", pair.student) if student is None else ("teacher", pair.teacher)
                absent[index] = f"{side} layer {name!r}"
                neurons[-1].append(counts[index].none_observed(device))
                continue
            ran.add(index)
            neurons[-1].append(match_positions(student, teacher, f"{pair.student!r} -> {pair.teacher!r}"))
            if student.requires_grad:
                constant.pop(index, None)
    if len(constant) == len(pairs) == len(ran):
        raise ConstantTermError(
            f"The transfer term is constant: the outputs of the student layers {list(constant.values())} do not depend "
            "on any parameter that requires a gradient. Unfreeze the layers, choose others, or check for `no_grad`, "
            "`detach` and reentrant activation checkpointing (use_reentrant=False is supported). While layers are "
            "frozen on purpose, a `schedule` of 0 leaves the term out."
        )
    return Matched(
        neurons,
        [name for index, name in constant.items() if index in ran],
        {index: layer for index, layer in absent.items() if index not in ran},
    )


def check_graphs(views: Sequence[View]) -> None:
    """Look for forwards through which a backward pass has gone.

    Raises:
        NoTermError: If there are some, because the backward pass of a loss with the term would fail.
    """
    freed = sum(has_freed_graph(view.recorded) for view in views)
    if freed:
        raise NoTermError(
            f"A backward pass has gone through {freed} of the {len(views)} forwards of the student since the last call "
            "and freed their graphs, so that the backward pass of the term would fail. Forwards of inner steps, as of "
            "an attack, of meta-learning or of another critic step, are no part of the term. Leave them out:\n\n"
            "    with transfer.paused():  # in a Trainer: callback.transfer.paused()\n"
            "        (gradient,) = torch.autograd.grad(loss_of(student(x)), x)\n\n"
            "Where the forward is the one that is trained on, call `transfer.loss()` before its backward pass."
        )


def why_absent(layers: Iterable[str]) -> str:
    """What to say of layers that did not run in any call so far."""
    return (
        f"The {' and the '.join(layers)} did not run in this forward nor in any before, but did when the layers were "
        "chosen, in evaluation mode. A branch that is skipped in training, a layer whose parent was compiled before it "
        "was hooked, or a `forward` that is called directly are likely causes; choose a layer that runs in training, "
        "such as its parent."
    )


def _only_call(index: int, pair: LayerPair, view: View, side: str) -> Tensor | None:
    """The reading of one side of a pair, None if its layer did not run."""
    readings, name = (view.student, pair.student) if side == "student" else (view.teacher, pair.teacher)
    calls = readings.get(index, [])
    # Another transfer may trace this student inside the recorded forward; those readings have no gradient.
    calls = [reading for reading in calls if reading.requires_grad] or calls
    if len(calls) > 1:
        raise NoTermError(
            f"The {side} layer {name!r} ran {len(calls)} times in this forward, but once when the layers were chosen, "
            "in evaluation mode. A representation is one call. A shared module or a loop that only training runs are "
            "likely causes; choose a layer that runs once, such as its parent."
        )
    return calls[0] if calls else None
