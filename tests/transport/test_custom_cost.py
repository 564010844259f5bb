"""A user's function as a cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transport_problems import draw, draw_plan, value_of

from lightning_otrt.transport.custom_cost import CustomCost


def test_callable_sums_weigh_matrices_by_observations() -> None:
    cost = CustomCost(torch.cdist)
    parts = [(draw(4, count), draw(5, count, seed=1)) for count in (3, 9)]
    sums = [a + b for a, b in zip(*(cost.sums(*part) for part in parts), strict=True)]
    expected = 0.25 * torch.cdist(*parts[0]) + 0.75 * torch.cdist(*parts[1])
    torch.testing.assert_close(cost.matrix(sums, cost.energy(parts[0][1])), expected)


def test_callable_value_and_gradient_are_those_of_autograd() -> None:
    y, x, plan = draw(2, 4, 6), draw(2, 5, 6, seed=1), draw_plan(2, 4, 5)
    leaf = y.clone().requires_grad_()
    expected = (plan * torch.cdist(leaf, x)).sum((1, 2))
    expected.sum().backward()
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            value, gradient = value_of(CustomCost(torch.cdist), y, x, plan)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradient, leaf.grad)
        assert not value.requires_grad


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda y, x: torch.cdist(y, x)[:, :-1], r"shape \(4, 5\), but got \(4, 4\)"),
        (lambda y, x: torch.cdist(y, x).mean(), r"shape \(4, 5\), but got \(\)"),
        (lambda y, x: torch.cdist(y, x).numpy(), r"but got ndarray"),
    ],
)
def test_callable_of_wrong_shape(function: Callable[[Tensor, Tensor], Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CustomCost(function).sums(draw(4, 6), draw(5, 6))


@pytest.mark.parametrize("of_student", [False, True])
def test_callable_that_writes_to_its_arguments(of_student: bool) -> None:
    def function(y: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            (y if of_student else x).sub_(1)
        return (y[:, None] - x).abs().sum(-1)

    with pytest.raises(ValueError, match="writes to its arguments in place.*Compute on new tensors"):
        CustomCost(function).sums(torch.randn(3, 6), torch.randn(4, 6))


def test_callable_without_gradient() -> None:
    cost = CustomCost(lambda y, x: torch.cdist(y.detach(), x))
    with pytest.raises(ValueError, match="does not depend on the student neurons in a differentiable way"):
        value_of(cost, draw(4, 6), draw(5, 6), draw_plan(4, 5))
