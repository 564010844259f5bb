"""The weights at a step: the schedule is called once for each, and what is set takes effect at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import LAYERS, Net, loader, make_task, make_teacher, make_trainer
from torch import Tensor

from lightning_otrt import OTRTCallback, RepresentationTransfer
from lightning_otrt.weights import StepWeights, Weights

PAIRS = {"block1": "block1"}


def noted(factor: Callable[[int], float] = lambda step: 1.0) -> tuple[Callable[[int], float], list[int]]:
    """A schedule, and the steps that it was called with."""
    steps: list[int] = []

    def schedule(step: int) -> float:
        steps.append(step)
        return factor(step)

    return schedule, steps


def image() -> Tensor:
    return torch.randn(8, 1, 8, 8)


def test_weights_are_computed_when_they_are_needed():
    schedule, steps = noted(lambda step: step / 2)
    weights = StepWeights(Weights(2.0, 0.5), schedule)
    weights.step = 1
    assert not steps
    assert weights.now() == weights.now() == Weights(1.0, 0.25)
    weights.step = 1
    assert weights.now() == Weights(1.0, 0.25)
    assert steps == [1]
    weights.step = 4
    weights.set(Weights(1.0, 0.0), schedule)
    assert weights.now() == Weights(2.0, 0.0)
    assert steps == [1, 4]


@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_once_for_each_step_of_a_fit(factor):
    schedule, steps = noted(lambda step: factor if step else 1.0)
    callback = OTRTCallback(make_teacher(), LAYERS, schedule=schedule)
    make_trainer(callbacks=[callback]).fit(make_task(), loader())
    assert steps == [0, 1, 2, 3]


def test_once_for_each_step_where_gradients_are_accumulated():
    """The step is that of the optimizer, and several batches share it."""
    schedule, steps = noted()
    callback = OTRTCallback(make_teacher(), LAYERS, schedule=schedule)
    make_trainer(callbacks=[callback], max_steps=2, accumulate_grad_batches=2).fit(make_task(), loader())
    assert steps == [0, 1]


def test_once_for_each_step_of_a_loop():
    schedule, steps = noted()
    student, transfer = Net(), RepresentationTransfer(make_teacher(), PAIRS, schedule=schedule)
    with transfer.attached(student):
        for _ in range(3):
            with transfer.paused():
                student(image())
            student(image())
            transfer.loss()
    # The last one says whether the next forward is recorded.
    assert steps == [0, 1, 2, 3]


def test_once_for_each_step_where_recording_is_switched():
    schedule, steps = noted()
    student, transfer = Net(), RepresentationTransfer(make_teacher(), PAIRS, schedule=schedule)
    transfer.attach(student)
    for _ in range(3):
        with transfer.recording(), transfer.paused():
            student(image())
        with transfer.recording():
            student(image())
        transfer.loss()
    transfer.detach()
    assert steps == [0, 1, 2]


def test_what_is_set_takes_effect_at_once():
    """Between two forwards of one step, too."""
    student, transfer = Net(), RepresentationTransfer(make_teacher(), PAIRS, schedule=lambda step: float(step == 5))
    with transfer.attached(student):
        student(image())
        assert not transfer.has_views
        transfer.step = 5
        student(image())
        assert len(transfer.views) == 1
        transfer.weight = 0
        student(image())
        assert len(transfer.views) == 1
        transfer.weight = 3
        student(image())
        assert len(transfer.views) == 2
        assert transfer.current_weights == (3.0, 0.0)
        transfer.schedule = None
        transfer.step = 6
        student(image())
        assert len(transfer.views) == 3
        assert transfer.current_weights.transport == 3.0
        transfer.discard()
