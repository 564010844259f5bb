"""What the first batch is refused for, and what it is warned of."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from engines import COSTS, call, draw, make


def test_first_call_names_the_layer() -> None:
    y, x = draw()
    x[0, 0] = math.nan
    with pytest.raises(ValueError, match="Teacher layer 't0' has 1 NaN"):
        call(make(), (y, x))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    ("factor", "words"), [(1e30, r"e\+30, whose squares overflow"), (1e-30, r"e-30, .* vanish in")]
)
def test_values_whose_squares_leave_the_range_are_refused_by_name(cost: str, factor: float, words: str) -> None:
    y, x = draw()
    with torch.no_grad():
        y *= factor
    with pytest.raises(ValueError, match=rf"Student layer 's0' has values as large as .*{words}"):
        call(make(cost), (y, x))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("scale", [1e-20, 1e-22, 1e-23])
def test_values_whose_squares_nearly_vanish_are_refused(cost: str, scale: float) -> None:
    y, x = draw()
    with pytest.raises(ValueError, match="vanish in"):
        call(make(cost), ((y.detach() * scale).requires_grad_(), x * scale))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(("cost", "factor"), [("sqeuclidean", 100), ("sqeuclidean", 5), ("correlation", 100)])
def test_a_huge_neuron_that_blurs_all_others_is_told(cost: str, factor: float, side: int) -> None:
    """Epsilon is relative to the mean cost, which one neuron can carry alone; correlations know no sizes."""
    pair = draw()
    with torch.no_grad():
        pair[side][0] *= factor
    expected = pytest.warns(UserWarning, match="a single one of its") if factor == 100 else contextlib.nullcontext()
    with contextlib.nullcontext() if cost == "correlation" else expected:
        call(make(cost), pair)


@pytest.mark.parametrize("side", [0, 1])
def test_neurons_overshadowed_by_a_huge_one_are_told(side: int) -> None:
    pair = draw()
    with torch.no_grad():
        pair[side][0] *= 1e6
    with pytest.warns(UserWarning, match=r"layer '[st]0': \d+ of its \d+ neurons vary by less than"):
        call(make(), pair)
