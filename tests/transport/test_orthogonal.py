"""The orthogonal coupling against autograd, finite differences, scipy and its invariances."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from lightning_otrt.transport.correlation import CorrelationCost
from lightning_otrt.transport.cost import Sums, ValueAndGradient
from lightning_otrt.transport.orthogonal import OrthogonalAlignment, random_projection

POWERS = (0.0, 0.4, 1.0)
WIDTHS = ((4, 7), (6, 6), (8, 5), (1, 4), (4, 1))
OBSERVATIONS = 40


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Neurons of different means and scales, as layers have them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    mean, scale = torch.randn((2, *shape[:-1], 1), generator=generator, dtype=torch.float64)
    return (values * scale.exp() + mean).to(dtype)


def rotation(size: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def solve(coupling: OrthogonalAlignment, y: Tensor, x: Tensor) -> Tensor:
    return coupling.solve(coupling.sums(y, x))


def omega(y: Tensor, target: Tensor, power: float) -> Tensor:
    """Ω by its definition; ``target`` is not normalised, and a constant."""

    def unit(rows: Tensor) -> Tensor:
        rows = rows - rows.mean(1, keepdim=True)
        rows = rows / rows.norm(dim=1, keepdim=True) ** power
        return rows / rows.norm()

    return 1 - (unit(y) * unit(target)).sum()


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("rows", "columns"), WIDTHS)
def test_value_and_gradient_are_those_of_autograd(power: float, rows: int, columns: int) -> None:
    y, x = draw(rows, OBSERVATIONS).requires_grad_(), draw(columns, OBSERVATIONS, seed=1)
    coupling = OrthogonalAlignment(power)
    matrix = solve(coupling, y.detach(), x)
    value, gradient = coupling.value(y.detach(), x, matrix)
    expected = omega(y, matrix @ x, power)
    (expected_gradient,) = torch.autograd.grad(expected, y)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("power", POWERS)
def test_gradient_is_that_of_finite_differences_with_the_target_held(power: float) -> None:
    y, x, coupling = draw(3, 8), draw(5, 8, seed=1), OrthogonalAlignment(power)
    matrix = solve(coupling, y, x)
    _, gradient = coupling.value(y, x, matrix)
    for index in itertools.product(range(3), range(8)):
        values = []
        for sign in (1, -1):
            moved = y.clone()
            moved[index] += sign * 1e-6
            values.append(coupling.value(moved, x, matrix)[0])
        assert gradient[index].item() == pytest.approx(float(values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (8, 5)])
def test_envelope_of_raw_neurons(rows: int, columns: int) -> None:
    """Where the student is as wide or wider, the gradient is also that of Ω with the matrix solved again."""
    y, x, coupling = draw(rows, OBSERVATIONS), draw(columns, OBSERVATIONS, seed=1), OrthogonalAlignment(0.0)
    _, gradient = coupling.value(y, x, solve(coupling, y, x))
    direction = draw(rows, OBSERVATIONS, seed=2)
    values = [
        coupling.value(moved, x, solve(coupling, moved, x))[0] for moved in (y + 1e-6 * direction, y - 1e-6 * direction)
    ]
    assert float((gradient * direction).sum()) == pytest.approx(float(values[0] - values[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (8, 5)])
def test_raw_value_is_the_disparity_of_scipy(rows: int, columns: int) -> None:
    """1 - Ω is the sum of singular values of layers of unit norm; scipy returns it beside its rotation."""
    y, x, coupling = draw(rows, OBSERVATIONS), draw(columns, OBSERVATIONS, seed=1), OrthogonalAlignment(0.0)
    padded = torch.cat([x - x.mean(1, keepdim=True), torch.zeros(rows - columns, OBSERVATIONS)])
    own = y - y.mean(1, keepdim=True)
    _, total = orthogonal_procrustes((padded / padded.norm()).numpy().T, (own / own.norm()).numpy().T)
    value, _ = coupling.value(y, x, solve(coupling, y, x))
    assert value.item() == pytest.approx(1 - total, abs=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("observations", [7, 200])
def test_a_rotated_copy_costs_nothing(dtype: torch.dtype, tolerance: float, observations: int) -> None:
    teacher = draw(12, observations)
    student = (3 * rotation(12) @ teacher + 1).to(dtype)
    coupling = OrthogonalAlignment(0.0)
    value, gradient = coupling.value(student, teacher.to(dtype), solve(coupling, student, teacher.to(dtype)))
    assert value.abs() <= tolerance
    assert gradient.norm() * student.norm() <= 1e3 * tolerance
    # Standardised neurons are not invariant to that: the test is none of a value that is always 0.
    standardised = OrthogonalAlignment(1.0)
    assert standardised.value(student, teacher.to(dtype), solve(standardised, student, teacher.to(dtype)))[0] > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_permuted_and_rescaled_copy_costs_nothing(dtype: torch.dtype, tolerance: float) -> None:
    teacher = draw(12, 200)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    student = (torch.linspace(0.1, 9, 12, dtype=torch.float64)[:, None] * teacher[order] - 2).to(dtype)
    coupling = OrthogonalAlignment(1.0)
    value, gradient = coupling.value(student, teacher.to(dtype), solve(coupling, student, teacher.to(dtype)))
    assert value.abs() <= tolerance
    assert gradient.norm() * student.norm() <= 1e3 * tolerance
    raw = OrthogonalAlignment(0.0)
    assert raw.value(student, teacher.to(dtype), solve(raw, student, teacher.to(dtype)))[0] > 1e-3


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("rows", "columns"), WIDTHS)
def test_does_not_depend_on_order_means_or_the_scale_of_a_layer(power: float, rows: int, columns: int) -> None:
    y, x, coupling = draw(rows, OBSERVATIONS), draw(columns, OBSERVATIONS, seed=1), OrthogonalAlignment(power)
    value, gradient = coupling.value(y, x, solve(coupling, y, x))
    own, other = (torch.randperm(size, generator=torch.Generator().manual_seed(4)) for size in (rows, columns))
    moved_y, moved_x = 1e3 * y[own] - 7, 1e-3 * x[other] + 5
    moved_value, moved_gradient = coupling.value(moved_y, moved_x, solve(coupling, moved_y, moved_x))
    torch.testing.assert_close(moved_value, value, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(1e3 * moved_gradient, gradient[own], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("rows", "columns"), WIDTHS)
def test_widths(power: float, rows: int, columns: int) -> None:
    """Rows of Q are orthonormal for N <= M, columns for N >= M; following the gradient comes near the target."""
    y, x, coupling = draw(rows, OBSERVATIONS), draw(columns, OBSERVATIONS, seed=1), OrthogonalAlignment(power)
    matrix = solve(coupling, y, x)
    q = matrix * (x - x.mean(1, keepdim=True)).norm(dim=1) ** power
    gram = q @ q.mT if rows <= columns else q.mT @ q
    torch.testing.assert_close(gram, torch.eye(min(rows, columns), dtype=torch.float64), rtol=0, atol=1e-10)
    target = matrix @ (x - x.mean(1, keepdim=True))
    assert coupling.value(target, x, matrix)[0].abs() < 1e-12
    first, gradient = coupling.value(y, x, matrix)
    for _ in range(300):
        _, gradient = coupling.value(y, x, matrix)
        y = y - 0.1 * gradient * (y - y.mean(1, keepdim=True)).norm() ** 2
    assert coupling.value(y, x, matrix)[0] < 0.2 * first


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("observations", [3, 5])
def test_fewer_observations_than_neurons(power: float, observations: int) -> None:
    """The rank is n - 1, and nothing else of the matrix is made up."""
    y, x, coupling = draw(8, observations), draw(10, observations, seed=1), OrthogonalAlignment(power)
    matrix = solve(coupling, y, x)
    assert int(torch.linalg.matrix_rank(matrix)) == observations - 1
    value, gradient = coupling.value(y, x, matrix)
    assert 0 <= value < 1
    assert gradient.isfinite().all()
    # The same from another order of operations: no direction is chosen by rounding.
    order = torch.arange(9, -1, -1)
    torch.testing.assert_close(solve(coupling, y, x[order]), matrix[:, order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("power", POWERS)
def test_neurons_that_repeat_each_other(power: float) -> None:
    y, x, coupling = draw(4, OBSERVATIONS).repeat(2, 1), draw(6, OBSERVATIONS, seed=1), OrthogonalAlignment(power)
    matrix = solve(coupling, y, x)
    torch.testing.assert_close(matrix[:4], matrix[4:], rtol=0, atol=1e-10)
    assert coupling.value(y, x, matrix)[1].isfinite().all()


DEAD = {"zero": 0.0, "constant": 1.0, "far": -1234.567, "share": 1e-4}


@pytest.mark.parametrize("kind", DEAD)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_neurons_have_no_part(kind: str, side: str, power: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    y, x = (torch.randn(size, 64, generator=generator, dtype=torch.float64) for size in (6, 7))
    live = OrthogonalAlignment(power)
    dead = 1e-4 * torch.randn(2, 64, generator=generator, dtype=torch.float64) if kind == "share" else DEAD[kind]
    with_dead = [torch.cat([part, torch.zeros(2, 64) + dead]) if side in (name, "both") else part
                 for name, part in (("student", y), ("teacher", x))]  # fmt: skip
    y, x, dead_y, dead_x = (part.to(dtype) for part in (y, x, *with_dead))
    matrix = solve(live, dead_y, dead_x)
    value, gradient = live.value(dead_y, dead_x, matrix)
    expected_value, expected_gradient = live.value(y, x, solve(live, y, x))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(value, expected_value, rtol=0, atol=tolerance)
    torch.testing.assert_close(gradient[:6], expected_gradient, rtol=0, atol=tolerance)
    assert gradient[6:].abs().sum() == 0
    assert matrix[:, 7:].abs().sum() == 0


@pytest.mark.parametrize("power", POWERS)
def test_layers_that_are_dead_throughout(power: float) -> None:
    coupling, live, dead = OrthogonalAlignment(power), draw(4, 50, dtype=torch.float32), torch.full((5, 50), 0.1)
    for y, x in ((dead, live), (live, dead), (dead, dead)):
        matrix = solve(coupling, y, x)
        assert torch.equal(matrix, torch.zeros_like(matrix))
        value, gradient = coupling.value(y, x, matrix)
        assert value == 1
        assert torch.equal(gradient, torch.zeros_like(gradient))
    # A matrix of an earlier batch, and then a batch on which the teacher is constant.
    matrix = solve(coupling, draw(4, 50, seed=3, dtype=torch.float32), draw(5, 50, seed=4, dtype=torch.float32))
    value, gradient = coupling.value(live, dead, matrix)
    assert value == 1
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("power", POWERS)
def test_neurons_that_are_not_finite_reach_the_value(power: float) -> None:
    y, x, coupling = draw(4, 50), draw(5, 50, seed=1), OrthogonalAlignment(power)
    matrix, broken = solve(coupling, y, x), y.clone()
    broken[1, 2] = float("inf")
    assert coupling.value(broken, x, matrix)[0].isnan()
    assert solve(coupling, broken, x).isnan().all()


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(3, 7), (6, 6), (8, 5)])
def test_batch_is_the_loop_and_inputs_are_left_alone(power: float, contiguous: bool, rows: int, columns: int) -> None:
    y, x, coupling = draw(3, rows, OBSERVATIONS), draw(3, columns, OBSERVATIONS, seed=1), OrthogonalAlignment(power)
    if not contiguous:
        y, x = (side.mT.contiguous().mT for side in (y, x))
    before = y.clone(), x.clone()
    matrix = solve(coupling, y, x)
    value, gradient = coupling.value(y, x, matrix)
    assert torch.equal(y, before[0])
    assert torch.equal(x, before[1])
    for index in range(3):
        single = solve(coupling, y[index], x[index])
        torch.testing.assert_close(matrix[index], single, rtol=1e-9, atol=1e-11)
        expected = coupling.value(y[index], x[index], single)
        torch.testing.assert_close((value[index], gradient[index]), expected, rtol=1e-9, atol=1e-11)


def reference_of(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return y[..., :1] + 0.1, x[..., :1] - 0.1


def added(parts: list[Sums]) -> Sums:
    return [torch.stack(list(each)).sum(0) for each in zip(*parts, strict=True)]


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("sizes", [(20, 20), (1, 9, 30), (37, 3)])
def test_sums_of_parts_give_the_matrix_of_the_whole(power: float, sizes: tuple[int, ...]) -> None:
    y, x, coupling = draw(4, 40), draw(5, 40, seed=1), OrthogonalAlignment(power)
    reference = reference_of(y, x)
    parts = [coupling.sums(*part, reference) for part in zip(y.split(sizes, 1), x.split(sizes, 1), strict=True)]
    torch.testing.assert_close(coupling.solve(added(parts)), solve(coupling, y, x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("power", POWERS)
def test_running_sums_go_on_from_a_saved_state(power: float) -> None:
    coupling, batches = OrthogonalAlignment(power), [(draw(4, 30, seed=s), draw(5, 30, seed=9 + s)) for s in range(6)]
    reference = reference_of(*batches[0])
    running = coupling.sums(*batches[0], reference)
    weights = [0.9**power_of for power_of in range(5, -1, -1)]
    for batch in batches[1:3]:
        running = CorrelationCost().accumulate(running, 0.9, *batch, reference)
    running = [part.clone() for part in running]
    for batch in batches[3:]:
        running = CorrelationCost().accumulate(running, 0.9, *batch, reference)
    each = [coupling.sums(*batch, reference) for batch in batches]
    expected = added([[w * part for part in sums] for w, sums in zip(weights, each, strict=True)])
    torch.testing.assert_close(coupling.solve(running), coupling.solve(expected), rtol=1e-6, atol=1e-8)


def over_processes(
    coupling: OrthogonalAlignment, y: Tensor, x: Tensor, matrix: Tensor, sizes: tuple[int, ...]
) -> list[ValueAndGradient]:
    """The rounds of several processes side by side, each of which is sent the sums over all."""
    generators = [
        coupling.shared_value(*part, matrix) for part in zip(y.split(sizes, -1), x.split(sizes, -1), strict=True)
    ]
    total = added([next(generator) for generator in generators])
    results = []
    for generator in generators:
        with pytest.raises(StopIteration) as stop:
            generator.send(total)
        results.append(stop.value.value)
    return results


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("sizes", [(20, 20), (1, 9, 30), (37, 3)])
@pytest.mark.parametrize(("rows", "columns"), WIDTHS)
def test_processes_together_are_one(power: float, sizes: tuple[int, ...], rows: int, columns: int) -> None:
    """One round, of vectors: value and gradient are those of a single process that has all observations."""
    y, x, coupling = draw(rows, 40), draw(columns, 40, seed=1), OrthogonalAlignment(power)
    matrix = solve(coupling, y, x)
    expected_value, expected_gradient = coupling.value(y, x, matrix)
    results = over_processes(coupling, y, x, matrix, sizes)
    for value, _ in results:
        torch.testing.assert_close(value, expected_value, rtol=1e-10, atol=1e-12)
    gradient = torch.cat([gradient for _, gradient in results], -1)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    [single] = over_processes(coupling, y, x, matrix, (40,))
    torch.testing.assert_close(single, (expected_value, expected_gradient), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("power", POWERS)
def test_processes_in_float32_with_large_means(power: float) -> None:
    y, x, coupling = draw(6, 400), draw(7, 400, seed=1), OrthogonalAlignment(power)
    y, x = y + 300 * y.std(1, keepdim=True), x - 300 * x.std(1, keepdim=True)
    matrix = solve(coupling, y, x)
    expected, expected_gradient = coupling.value(y, x, matrix)
    results = over_processes(coupling, y.float(), x.float(), matrix.float(), (100, 300))
    torch.testing.assert_close(results[0][0], expected.float(), rtol=0, atol=1e-4)
    gradient = torch.cat([part for _, part in results], -1)
    assert (gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm()


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("rows", "columns"), WIDTHS)
def test_control(power: float, rows: int, columns: int) -> None:
    """A fixed projection of the same shape and norms, which looks at no correlation."""
    projection = random_projection(rows, columns, seed=3)
    assert torch.equal(projection, random_projection(rows, columns, seed=3))
    assert min(rows, columns) == 1 or not torch.equal(projection, random_projection(rows, columns, seed=4))
    gram = projection @ projection.mT if rows <= columns else projection.mT @ projection
    torch.testing.assert_close(gram, torch.eye(min(rows, columns)), rtol=0, atol=1e-6)
    y, x, coupling = draw(rows, OBSERVATIONS), draw(columns, OBSERVATIONS, seed=1), OrthogonalAlignment(power)
    sums = coupling.sums(y, x)
    matrix = coupling.solve(sums, projection)
    norms = (x - x.mean(1, keepdim=True)).norm(dim=1)
    torch.testing.assert_close(matrix, projection.double() / norms**power, rtol=1e-9, atol=1e-12)
    if rows >= columns and power == 0:
        assert coupling.value(y, x, matrix)[0] > coupling.value(y, x, coupling.solve(sums))[0]


def test_random_projections_are_uniform() -> None:
    """Entries of Haar's measure have mean 0 and variance 1 / M, diagonal included, which a bare QR has not."""
    drawn = torch.stack([random_projection(3, 5, seed) for seed in range(2000)])
    np.testing.assert_allclose(drawn.mean(0).numpy(), 0, atol=0.05)
    np.testing.assert_allclose(drawn.square().mean(0).numpy(), 1 / 5, atol=0.03)


@pytest.mark.parametrize("power", [-0.1, 1.5, float("nan")])
def test_power_out_of_range(power: float) -> None:
    with pytest.raises(ValueError, match="Expected argument `power` to lie between 0"):
        OrthogonalAlignment(power)


def test_large_means_in_float32() -> None:
    """At a mean 1000 times the deviation raw moments in float32 would lose everything."""
    y, x = draw(6, 500), draw(8, 500, seed=1)
    coupling = OrthogonalAlignment(1.0)
    matrix = solve(coupling, y, x)
    expected, _ = coupling.value(y, x, matrix)
    far_y, far_x = ((side + 1000 * side.std(1, keepdim=True)).float() for side in (y, x))
    reference = (far_y[:, :50].mean(1, keepdim=True), far_x[:, :50].mean(1, keepdim=True))
    found = coupling.solve(coupling.sums(far_y, far_x, reference))
    value, _ = coupling.value(far_y, far_x, found)
    torch.testing.assert_close(value, expected.float(), rtol=0, atol=2e-3)
