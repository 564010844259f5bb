"""The polar factor against scipy, and the proof that the fixed number of steps is enough."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes, polar
from torch import Tensor

from lightning_otrt.transport.polar import EXPRESS, LAST, LAST_STEPS, newton_schulz, polar_factor

#: Singular values down to this share of the largest are brought to 1 by the iteration.
REACH = 1e-5
#: The interval of each step, from the one that the steps before leave (see `EXPRESS`): its end is SLACK times the old
#: one, and its start is at least CUSHION times the old end.
SLACK = 1.02
CUSHION = 0.1
SHAPES = ((5, 9), (7, 7), (9, 5), (1, 4), (4, 1))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_singular_values(rows: int, columns: int, values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with these singular values, and the partial isometry of those that are not 0."""
    u = torch.linalg.qr(draw(rows, len(values), seed=seed))[0]
    v = torch.linalg.qr(draw(columns, len(values), seed=seed + 1))[0]
    return (u * values) @ v.mT, (u * (values != 0)) @ v.mT


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_is_the_polar_factor_of_scipy(rows: int, columns: int, scale: float) -> None:
    matrix = draw(rows, columns)
    expected = polar(matrix.numpy(), side="left" if rows <= columns else "right")[0]
    np.testing.assert_allclose(polar_factor(scale * matrix).numpy(), expected, atol=1e-12)


def test_solves_the_procrustes_problem() -> None:
    y, x = draw(6, 40), draw(6, 40, seed=1)
    rotation, _ = orthogonal_procrustes(x.numpy().T, y.numpy().T)
    np.testing.assert_allclose(polar_factor(y @ x.mT).numpy(), rotation.T, atol=1e-12)


@pytest.mark.parametrize("function", [polar_factor, newton_schulz])
@pytest.mark.parametrize(("rows", "columns"), [(6, 11), (8, 8), (11, 6)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-9)])
def test_a_lower_rank_gives_the_partial_isometry(
    function: object, rows: int, columns: int, dtype: torch.dtype, tolerance: float
) -> None:
    matrix, expected = with_singular_values(rows, columns, torch.tensor([1.0, 0.3, 0.02, 0.0], dtype=torch.float64))
    assert callable(function)
    # The iteration lifts the rounding of the singular values that are 0, by at most 1e5.
    atol = tolerance if function is polar_factor else max(tolerance, 2e5 * torch.finfo(dtype).eps)
    torch.testing.assert_close(function(matrix.to(dtype)), expected.to(dtype), rtol=0, atol=atol)


def steps_on(values: Tensor, last_steps: int = LAST_STEPS) -> Tensor:
    """What the steps make of singular values, which is all that they do to a matrix."""
    for a, b, c in (*EXPRESS, *[LAST] * last_steps):
        values = a * values + b * values**3 + c * values**5
    return values


def test_the_steps_bring_every_singular_value_within_reach_to_one() -> None:
    values = torch.logspace(np.log10(REACH), np.log10(1.001), 400_001, dtype=torch.float64)
    assert (steps_on(values) - 1).abs().max() < 1e-9
    # One step less is not enough.
    assert (steps_on(values, LAST_STEPS - 1) - 1).abs().max() > 1e-6
    below = torch.logspace(-12, np.log10(REACH), 10_001, dtype=torch.float64)
    lifted = steps_on(below)
    assert (lifted > 0).all()
    assert (lifted < 1 + 1e-12).all()
    # Rounding of float32 stays far from 1.
    assert steps_on(torch.tensor([1e-8], dtype=torch.float64)) < 0.02


def test_each_step_has_the_least_largest_error_of_its_kind() -> None:
    """Four extrema of one size and alternating signs (Chebyshev), and then the interval of the next step."""
    low, high = REACH, 1.0
    for a, b, c in EXPRESS:
        inner = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
        least, most = max(low, CUSHION * high), SLACK * high
        assert least < inner[0] < inner[1] < most
        points = np.array([least, *inner, most])
        errors = a * points + b * points**3 + c * points**5 - 1
        np.testing.assert_allclose(np.abs(errors), abs(errors[0]), rtol=1e-5)
        assert (np.sign(errors) == [-1, 1, -1, 1]).all()
        low, high = min(a * low + b * low**3 + c * low**5, 1 - abs(errors[0])), 1 + abs(errors[0])


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-9)])
def test_the_iteration_agrees_with_the_decomposition(
    rows: int, columns: int, dtype: torch.dtype, tolerance: float
) -> None:
    matrix = draw(3, rows, columns, dtype=dtype)
    matrix = matrix / torch.linalg.matrix_norm(matrix)[:, None, None]
    torch.testing.assert_close(newton_schulz(matrix), polar_factor(matrix), rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [16, 96])
def test_the_iteration_in_float32_on_a_steep_spectrum(size: int) -> None:
    """A covariance whose singular values span four orders of magnitude, as those of trained layers do."""
    matrix, expected = with_singular_values(size, size, torch.logspace(0, -4, size, dtype=torch.float64))
    found = newton_schulz((matrix / torch.linalg.matrix_norm(matrix)).float())
    products = found @ found.mT
    torch.testing.assert_close(products, torch.eye(size), rtol=0, atol=2e-4)
    # Directions of the least singular values carry the rounding of the matrix, relative to them.
    assert (found - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("function", [polar_factor, newton_schulz])
def test_zero_stays_zero(function: object) -> None:
    assert callable(function)
    assert torch.equal(function(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))
    matrix = draw(4, 6, dtype=torch.float32)
    matrix[1], matrix[:, 2] = 0, 0
    found = function(matrix / matrix.norm())
    assert found[1].abs().max() < 1e-6
    assert found[:, 2].abs().max() < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_gives_nan_and_leaves_the_others_alone(bad: float) -> None:
    matrix = draw(2, 4, 4)
    matrix[1, 2, 3] = bad
    found = polar_factor(matrix)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[0], polar_factor(matrix[:1])[0], rtol=0, atol=1e-12)


def test_a_decomposition_that_fails_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAPACK does not converge on some rare matrices; the iteration has no such case."""
    matrix = draw(5, 8)
    expected = polar_factor(matrix)

    def fails(*args: object, **kwargs: object) -> None:
        raise torch.linalg.LinAlgError("the algorithm did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    torch.testing.assert_close(polar_factor(matrix), expected, rtol=0, atol=1e-9)
