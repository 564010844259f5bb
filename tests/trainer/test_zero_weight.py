"""A weight of zero is a fit without the plugin, and one of next to nothing moves no random number."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    LAYERS,
    Task,
    assert_same,
    forwards,
    loader,
    make_task,
    make_teacher,
    make_trainer,
    weights,
)
from torch import Tensor
from trainer.fits import Seen, fitted, make_callback


def random_state() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


@pytest.mark.filterwarnings("ignore:The weight of the transfer term was 0 in all 4 training steps")
@pytest.mark.parametrize("schedule", [None, lambda step: 0.0])
@pytest.mark.parametrize("layers", [LAYERS, "auto"])
def test_a_weight_of_zero_is_a_fit_without_the_plugin(layers, schedule):
    teacher = make_teacher()
    callback = make_callback(teacher, layers=layers, weight=0.0 if schedule is None else 1.0, schedule=schedule)
    with forwards(teacher) as count:
        torch.manual_seed(7)
        found = fitted([callback], task=make_task(dropout=0.5))
        after = random_state()
    torch.manual_seed(7)
    assert_same(weights(found), weights(fitted([], task=make_task(dropout=0.5))))
    assert after == random_state()
    assert not count
    assert not callback.transfer.pairs


def test_a_schedule_that_starts_at_zero():
    """Nothing before it rises, all of the term after."""
    callback = make_callback(schedule=lambda step: float(step >= 2))
    seen = Seen()
    with forwards(callback.transfer.teacher.module) as count:
        fitted([callback, seen])
    assert [values["otrt/weight"] for values in seen.values] == [0.0, 0.0, 2.0, 2.0]
    assert ["train/otrt" in values for values in seen.values] == [False, False, True, True]
    assert len(count) == 5  # the first also traces the layers and sees how maps lie


@pytest.mark.parametrize("layers", [LAYERS, "auto", "penultimate"])
@pytest.mark.parametrize("plan", ["sinkhorn", "random"])
def test_a_weight_of_next_to_nothing_leaves_random_numbers_and_statistics_alone(layers, plan):
    options = {"dropout": 0.5}
    torch.manual_seed(7)
    found = fitted([make_callback(make_teacher(), layers=layers, plan=plan, weight=1e-30)], task=make_task(**options))
    after = random_state()
    torch.manual_seed(7)
    plain = fitted([], task=make_task(**options))
    assert after == random_state()
    found, plain = weights(found), weights(plain)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)
    assert_same(
        *({name: v for name, v in side.items() if "running" in name or "batches" in name} for side in (found, plain))
    )


class MicroBatches(Task):
    """Four backward passes and, in turn, one step of the optimizer for all of them or one for each."""

    def __init__(self, steps: int, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization, self.steps = False, steps

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        for place, part in enumerate(zip(*(tensor.chunk(4) for tensor in batch), strict=True)):
            self.manual_backward(self.loss(list(part)))
            if (place + 1) % (4 // self.steps) == 0:
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore:The learning rate scheduler")
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_schedule_of_terms_within_one_training_step(steps):
    """It goes by the steps of the optimizer, not by the terms."""
    asked: list[int] = []
    factors: list[float] = []

    class Logged(MicroBatches):
        def log(self, name: str, value: Any, **options: Any) -> None:
            if name == "otrt/weight":
                factors.append(float(value))
            super().log(name, value, **options)

    def schedule(step: int) -> float:
        asked.append(step)
        return 1.0 + step

    callback = make_callback(schedule=schedule, weight=1.0)
    task = make_task(Logged, steps=steps)
    make_trainer(max_steps=3 * steps, callbacks=[callback]).fit(task, loader(48, 16))
    assert factors == [1.0 + step for step in range(3 * steps) for _ in range(4 // steps)]
    assert set(asked) <= set(range(3 * steps + 1))


@pytest.mark.parametrize("active", [(0,), (1,), (0, 1), ()])
def test_a_schedule_that_ends_within_a_training_step(active):
    """Two steps of the optimizer in one training step, with a term in some of them: no error, and no other term."""
    callback = make_callback(schedule=lambda step: float(step in active or step > 3), strict=False)
    task = make_task(MicroBatches, steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The weight of the transfer term was 0")
        make_trainer(max_steps=8, callbacks=[callback]).fit(task, loader(64, 16))
    assert callback.transfer.run_state.calls > 0
