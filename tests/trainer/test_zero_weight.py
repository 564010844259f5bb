"""A weight of zero is a fit without the plugin, and one of next to nothing moves no random number."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    LAYERS,
    assert_same,
    forwards,
    make_task,
    make_teacher,
    weights,
)
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
