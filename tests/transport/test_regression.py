"""Linear regression between layers against scikit-learn, autograd and finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from torch import Tensor

from lightning_otrt.transport.cost import Sums
from lightning_otrt.transport.regression import Regression

WIDTHS = ((4, 7), (6, 6), (8, 5), (1, 4), (4, 1))
OBSERVATIONS = 40
KINDS = pytest.mark.parametrize("standardised", [True, False])


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Neurons of different means and scales, as layers have them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    mean, scale = torch.randn((2, *shape[:-1], 1), generator=generator, dtype=torch.float64)
    return values * scale.exp() + mean


def draw_related(rows: int, columns: int, observations: int = OBSERVATIONS) -> tuple[Tensor, Tensor]:
    """A teacher that the student predicts in part."""
    y = draw(rows, observations)
    mixed = draw(columns, rows, seed=1) @ y
    return y, mixed + 0.5 * mixed.std(1, keepdim=True) * draw(columns, observations, seed=2)


def solve(regression: Regression, y: Tensor, x: Tensor) -> Tensor:
    return regression.solve(regression.sums(y, x))


def scaled(side: Tensor, standardised: bool) -> Tensor:
    side = side - side.mean(1, keepdim=True)
    return side / side.norm(dim=1, keepdim=True) if standardised else side


def omega(y: Tensor, x: Tensor, weights: Tensor, standardised: bool) -> Tensor:
    """1 - R² by its definition."""
    y, x = scaled(y, standardised), scaled(x, standardised)
    return (x - weights @ y).square().sum() / x.square().sum()


@KINDS
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
@pytest.mark.parametrize(("rows", "columns"), WIDTHS)
def test_map_and_value_are_those_of_scikit_learn(standardised: bool, ridge: float, rows: int, columns: int) -> None:
    y, x = draw_related(rows, columns)
    own, other = (scaled(side, standardised).T.numpy() for side in (y, x))
    penalty = ridge if standardised else ridge * float((own**2).sum(0).mean())
    model = Ridge(alpha=penalty).fit(own, other)
    regression = Regression(standardised, ridge)
    weights = solve(regression, y, x)
    np.testing.assert_allclose(weights.numpy(), model.coef_.reshape(columns, rows), rtol=1e-7, atol=1e-9)
    predicted = model.predict(own).reshape(OBSERVATIONS, columns)
    weighting = "uniform_average" if standardised else "variance_weighted"
    expected = 1 - r2_score(other, predicted, multioutput=weighting)
    assert regression.value(y, x, weights)[0].item() == pytest.approx(expected, abs=1e-10)


@KINDS
@pytest.mark.parametrize(("rows", "columns"), WIDTHS)
def test_value_and_gradient_are_those_of_autograd(standardised: bool, rows: int, columns: int) -> None:
    y, x = draw_related(rows, columns)
    regression = Regression(standardised)
    weights = solve(regression, y, x) + 0.1 * draw(columns, rows, seed=5)
    y.requires_grad_()
    expected = omega(y, x, weights, standardised)
    (expected_gradient,) = torch.autograd.grad(expected, y)
    value, gradient = regression.value(y.detach(), x, weights)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-13)


@KINDS
def test_gradient_is_that_of_finite_differences_with_the_map_held(standardised: bool) -> None:
    y, x = draw_related(3, 4, 8)
    regression = Regression(standardised)
    weights = solve(regression, y, x)
    _, gradient = regression.value(y, x, weights)
    for index in itertools.product(range(3), range(8)):
        values = []
        for sign in (1, -1):
            moved = y.clone()
            moved[index] += sign * 1e-6
            values.append(regression.value(moved, x, weights)[0])
        assert gradient[index].item() == pytest.approx(float(values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-9)


@KINDS
def test_envelope(standardised: bool) -> None:
    """With a small ridge the gradient is also that of 1 - R² with the map solved again."""
    y, x = draw_related(4, 6)
    regression = Regression(standardised, 1e-12)
    _, gradient = regression.value(y, x, solve(regression, y, x))
    direction = draw(4, OBSERVATIONS, seed=3)
    values = [regression.value(m, x, solve(regression, m, x))[0] for m in (y + 1e-6 * direction, y - 1e-6 * direction)]
    assert float((gradient * direction).sum()) == pytest.approx(float(values[0] - values[1]) / 2e-6, rel=1e-5)


@KINDS
@pytest.mark.parametrize(("rows", "columns"), WIDTHS)
def test_does_not_depend_on_how_the_student_mixes_its_neurons(standardised: bool, rows: int, columns: int) -> None:
    y, x = draw_related(rows, columns)
    regression = Regression(standardised, 1e-12)
    mixed = draw(rows, rows, seed=6) @ y + 3
    values = [regression.value(side, x, solve(regression, side, x))[0] for side in (y, mixed)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-9)


@KINDS
def test_a_wider_student_that_knows_the_teacher_costs_nothing(standardised: bool) -> None:
    y = draw(8, OBSERVATIONS)
    x = draw(5, 8, seed=1) @ y
    regression = Regression(standardised, 1e-12)
    assert regression.value(y, x, solve(regression, y, x))[0] < 1e-9


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lower_ranks_and_few_observations(standardised: bool, dtype: torch.dtype) -> None:
    regression = Regression(standardised)
    for y, x in ((draw(20, 6), draw(9, 6, seed=1)), (draw(4, 50).repeat(3, 1), draw(9, 50, seed=1))):
        weights = solve(regression, y.to(dtype), x.to(dtype))
        value, gradient = regression.value(y.to(dtype), x.to(dtype), weights)
        assert 0 <= value <= 1
        assert gradient.isfinite().all()


@KINDS
@pytest.mark.parametrize("constant", [0.0, 0.1, -1234.567])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_neurons_have_no_part(standardised: bool, constant: float, dtype: torch.dtype) -> None:
    y, x = draw_related(6, 7, 64)
    dead = torch.full((2, 64), constant, dtype=torch.float64)
    regression = Regression(standardised)
    y, x, dead_y, dead_x = (side.to(dtype) for side in (y, x, torch.cat([y, dead]), torch.cat([x, dead])))
    weights = solve(regression, dead_y, dead_x)
    value, gradient = regression.value(dead_y, dead_x, weights)
    expected_value, expected_gradient = regression.value(y, x, solve(regression, y, x))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(value, expected_value, rtol=0, atol=tolerance)
    torch.testing.assert_close(gradient[:6], expected_gradient, rtol=0, atol=tolerance)
    assert gradient[6:].abs().sum() == 0
    assert weights[7:].abs().sum() == 0
    assert weights[:, 6:].abs().sum() == 0


@KINDS
def test_layers_that_are_dead_throughout(standardised: bool) -> None:
    regression, live, dead = Regression(standardised), draw(4, 50).float(), torch.full((5, 50), 0.1)
    for y, x, expected in ((dead, live, 1.0), (live, dead, 0.0), (dead, dead, 0.0)):
        value, gradient = regression.value(y, x, solve(regression, y, x))
        assert value.item() == pytest.approx(expected, abs=1e-6)
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_sums_that_are_not_finite_give_nan_and_raise_nothing() -> None:
    y, x = draw_related(4, 5)
    y[1, 2] = float("nan")
    assert solve(Regression(), y, x).isnan().all()


def added(parts: list[Sums]) -> Sums:
    return [torch.stack(list(each)).sum(0) for each in zip(*parts, strict=True)]


@KINDS
@pytest.mark.parametrize("sizes", [(20, 20), (1, 9, 30), (37, 3)])
@pytest.mark.parametrize(("rows", "columns"), WIDTHS)
def test_processes_together_are_one(standardised: bool, sizes: tuple[int, ...], rows: int, columns: int) -> None:
    y, x = draw_related(rows, columns)
    regression, reference = Regression(standardised), (y[:, :1] + 0.1, x[:, :1] - 0.1)
    parts = list(zip(y.split(sizes, 1), x.split(sizes, 1), strict=True))
    weights = regression.solve(added([regression.sums(*part, reference) for part in parts]))
    torch.testing.assert_close(weights, solve(regression, y, x), rtol=1e-8, atol=1e-10)
    expected_value, expected_gradient = regression.value(y, x, weights)
    generators = [regression.shared_value(*part, weights) for part in parts]
    sent = [next(generator) for generator in generators]
    sent = [generator.send(added(sent)) for generator in generators]
    gradients = []
    for generator in generators:
        with pytest.raises(StopIteration) as stop:
            generator.send(added(sent))
        value, gradient = stop.value.value
        torch.testing.assert_close(value, expected_value, rtol=1e-10, atol=1e-12)
        gradients.append(gradient)
    torch.testing.assert_close(torch.cat(gradients, 1), expected_gradient, rtol=1e-9, atol=1e-12)


@KINDS
def test_batch_is_the_loop_and_inputs_are_left_alone(standardised: bool) -> None:
    y, x = draw(3, 4, OBSERVATIONS), draw(3, 5, OBSERVATIONS, seed=1)
    before, regression = (y.clone(), x.clone()), Regression(standardised)
    weights = solve(regression, y, x)
    value, gradient = regression.value(y, x, weights)
    assert torch.equal(y, before[0])
    assert torch.equal(x, before[1])
    for index in range(3):
        torch.testing.assert_close(weights[index], solve(regression, y[index], x[index]), rtol=1e-9, atol=1e-11)
        expected = regression.value(y[index], x[index], weights[index])
        torch.testing.assert_close((value[index], gradient[index]), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("inf"), float("nan")])
def test_ridge_out_of_range(ridge: float) -> None:
    with pytest.raises(ValueError, match="Expected argument `ridge` to be positive and finite"):
        Regression(ridge=ridge)
