"""Schedules: what they give, and errors that say what a number of steps is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from torch import nn

from lightning_otrt import CosineDecay, LinearWarmup, LogitDistillation, RepresentationTransfer
from lightning_otrt.schedules import factor_at


def test_linear_warmup():
    assert [LinearWarmup(2)(step) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert LinearWarmup(1)(0) == 1.0


def test_cosine_decay():
    decay = CosineDecay(10, final=0.2)
    assert decay(0) == 1.0
    assert decay(5) == pytest.approx(0.6)
    assert decay(10) == decay(1000) == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", [LinearWarmup, CosineDecay])
@pytest.mark.parametrize(
    ("steps", "error", "got"),
    [
        ("3", TypeError, "but got '3' of type str"),
        (3.0, TypeError, "but got 3.0 of type float"),
        (True, TypeError, "but got True of type bool"),
        (None, TypeError, "but got None of type NoneType"),
        (0, ValueError, "but got 0"),
        (-2, ValueError, "but got -2"),
    ],
)
def test_steps(schedule, steps, error, got):
    """What was expected and found, where, what it means, and what to pass."""
    with pytest.raises(error) as raised:
        schedule(steps)
    text = str(raised.value)
    assert "`steps` to be a positive integer" in text
    assert got in text
    assert f"In {schedule.__name__} it is the number of optimizer steps until" in text
    assert text.endswith("pass at least 1.")


@pytest.mark.parametrize(
    ("final", "error"), [("0", TypeError), (None, TypeError), (-0.1, ValueError), (math.inf, ValueError)]
)
def test_final(final, error):
    with pytest.raises(
        error, match=r"`final` to be .*, but got .*In CosineDecay it is the factor on the weights of both terms after"
    ):
        CosineDecay(3, final=final)


@pytest.mark.parametrize("factor", [-1.0, math.nan, math.inf, "1", None, True])
def test_a_schedule_that_gives_no_factor(factor: Any):
    with pytest.raises(ValueError, match=r"`schedule` to give a finite number .* at step 7.*return a float"):
        factor_at(7, lambda step: factor)
    assert factor_at(7, lambda step: step) == 7.0
    assert factor_at(7, None) == 1.0


def test_a_schedule_that_fails():
    with pytest.raises(RuntimeError, match=r"^`schedule` \(.*\) failed at step 3. TypeError: .*with the step alone"):
        factor_at(3, lambda epoch, step: 1.0)


def test_a_number_of_numpy_is_a_factor():
    assert factor_at(3, lambda step: np.float32(0.5)) == 0.5
    assert float(LogitDistillation(np.float32(2)).weight) == 2
    RepresentationTransfer(nn.Linear(2, 2), weight=np.int64(2))
