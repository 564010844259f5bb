"""Checks of tensors: what passes, and what an error says."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_otrt.transport.tensor_checks import check_cost, check_finite, check_values


def test_finite_values_pass_even_where_their_sum_overflows() -> None:
    check_finite(torch.full((4, 4), 3e38), "x")


def test_values_that_are_not_finite_are_counted() -> None:
    with pytest.raises(ValueError, match=r"x has 2 NaN or infinite values of 3 \(shape \(3,\)\)"):
        check_finite(torch.tensor([0.0, math.nan, math.inf]), "x")
    with pytest.raises(ValueError, match="x has 1 NaN or infinite values of 3"):
        check_values(torch.tensor([0.0, math.inf, 1.0]), "x")


@pytest.mark.parametrize(("scale", "problem"), [(1e30, "overflow"), (1e-30, "vanish in")])
def test_squares_have_to_stay_within_the_type(scale: float, problem: str) -> None:
    values = torch.linspace(-1, 1, 12).view(3, 4)
    check_values(values, "x")
    check_values(torch.zeros(3, 4), "x")
    check_values(values.double() * scale, "x")
    with pytest.raises(ValueError, match=rf"x has values as large as 1e[+-]30, whose squares {problem} torch.float32"):
        check_values(values * scale, "x")


@pytest.mark.parametrize(("value", "words"), [
    (math.nan, "The cost 'mine' has 1 NaN or infinite values of 4"),
    (-1.0, "'mine' not to be negative, but its smallest value is -1. .* Add a constant"),
    (3e38, "'mine' to have a finite mean, .* go up to 3e.38 and overflow torch.float32. Scale the cost"),
])  # fmt: skip
def test_costs(value: float, words: str) -> None:
    check_cost(torch.zeros(2, 2), "mine")
    matrix = torch.full((2, 2), value) if value > 1 else torch.tensor([[1.0, 0.0], [value, 1.0]])
    with pytest.raises(ValueError, match=words):
        check_cost(matrix, "mine")
