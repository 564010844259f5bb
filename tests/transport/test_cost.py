"""What every cost has to do: against scipy, and value and gradient against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transport_problems import NAMES, OBSERVATIONS, draw, draw_plan, matrix_of, oracle, over_processes, value_of

from lightning_otrt.transport.cost import Cost, Plan, Sums, decay_and_add
from lightning_otrt.transport.named_costs import get_cost

WIDTHS = ((3, 7), (6, 6), (8, 5), (1, 4), (4, 1))


def central_differences(function: Callable[[Tensor], float], y: Tensor, step: float = 1e-6) -> Tensor:
    gradient = torch.empty_like(y)
    for index in np.ndindex(*y.shape):
        shifted = []
        for sign in (1, -1):
            moved = y.clone()
            moved[index] += sign * step
            shifted.append(function(moved))
        gradient[index] = (shifted[0] - shifted[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "columns"), WIDTHS)
def test_matrix_is_that_of_scipy(name: str, rows: int, columns: int) -> None:
    y, x = draw(rows, OBSERVATIONS), draw(columns, OBSERVATIONS, seed=1)
    expected = oracle(name, y, x)
    np.testing.assert_allclose(matrix_of(get_cost(name), y, x).numpy(), expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(matrix_of(get_cost(name), y.float(), x.float()).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "columns"), WIDTHS)
def test_value_and_gradient_with_the_plan_held_fixed(name: str, rows: int, columns: int) -> None:
    y, x, plan = draw(rows, OBSERVATIONS), draw(columns, OBSERVATIONS, seed=1), draw_plan(rows, columns)

    def transported(moved: Tensor) -> float:
        return float((plan.numpy() * oracle(name, moved, x)).sum())

    value, gradient = value_of(get_cost(name), y, x, plan)
    assert value.item() == pytest.approx(transported(y), rel=1e-12)
    torch.testing.assert_close(gradient, central_differences(transported, y), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [*NAMES, "callable"])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(3, 7), (6, 6), (8, 5)])
def test_batch_is_the_loop_and_inputs_are_left_alone(name: str, contiguous: bool, rows: int, columns: int) -> None:
    cost = get_cost(torch.cdist if name == "callable" else name)
    y, x, plan = draw(3, rows, OBSERVATIONS), draw(3, columns, OBSERVATIONS, seed=1), draw_plan(3, rows, columns)
    if not contiguous:
        y, x, plan = (tensor.mT.contiguous().mT for tensor in (y, x, plan))
        assert not y.is_contiguous()
    before = [tensor.clone() for tensor in (y, x, plan)]
    matrix, (value, gradient) = matrix_of(cost, y, x), value_of(cost, y, x, plan)
    assert all(torch.equal(now, then) for now, then in zip((y, x, plan), before, strict=True))
    for index in range(3):
        single = y[index], x[index], plan[index]
        torch.testing.assert_close(matrix[index], matrix_of(cost, *single[:2]), rtol=1e-12, atol=1e-13)
        expected_value, expected_gradient = value_of(cost, *single)
        torch.testing.assert_close(value[index], expected_value, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(gradient[index], expected_gradient, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(expected_value, (plan[index] * matrix[index]).sum(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_all_neurons_equal_gives_zero_and_no_gradient(name: str) -> None:
    y = draw(1, OBSERVATIONS, dtype=torch.float32).expand(4, -1)
    value, gradient = value_of(get_cost(name), y, y, torch.eye(4) / 4)
    assert value.abs().item() < 1e-3
    assert gradient.isfinite().all()
    assert gradient.abs().max() < (1e-3 if name != "euclidean" else 0.25)


@pytest.mark.parametrize("name", [*NAMES, "callable"])
@pytest.mark.parametrize("sizes", [(6, 6), (1, 4, 7), (9, 3)])
def test_sums_of_parts_add_up_to_those_of_the_whole(name: str, sizes: tuple[int, ...]) -> None:
    cost = get_cost((lambda y, x: torch.cdist(y, x).square()) if name == "callable" else name)
    y, x = draw(4, 12), draw(5, 12, seed=1)
    reference = (y[:, :1] + 0.1, x[:, :1] - 0.1) if name == "correlation" else None
    total: Sums | None = None
    energy = torch.zeros(2, dtype=torch.float64)
    for part_y, part_x in zip(y.split(sizes, 1), x.split(sizes, 1), strict=True):
        sums = cost.sums(part_y, part_x, reference)
        # The average of a callable is weighted by observations, and squared distances grow with their number.
        sums = [sums[0], sums[1] / part_y.shape[1]] if name == "callable" else sums
        total = sums if total is None else [old + new for old, new in zip(total, sums, strict=True)]
        energy += cost.energy(part_x)
    assert total is not None
    torch.testing.assert_close(total[0].item(), 12.0)
    torch.testing.assert_close(energy, cost.energy(x), rtol=1e-13, atol=0)
    whole = matrix_of(cost, y, x) / (12 if name == "callable" else 1)
    torch.testing.assert_close(cost.matrix(total, energy), whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [(8, 8, 8), (3, 8, 13), (1, 22, 1)])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_three_processes_are_the_big_batch(name: str, sizes: tuple[int, ...], batch: tuple[int, ...]) -> None:
    y, x = draw(*batch, 6, 24), draw(*batch, 5, 24, seed=1)
    y[..., 1, :], x[..., 2, :] = 0.7, -0.4
    # Constant in each process, yet not over all of them; and live in one process alone.
    y[..., 2, :] = torch.repeat_interleave(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.tensor(sizes))
    y[..., 3, sizes[0] :] = 1.5
    plan, cost = draw_plan(*batch, 6, 5), get_cost(name)
    value, gradient = value_of(cost, y, x, plan)
    results = over_processes(cost, y, x, plan, sizes)
    for (own_value, own_gradient), expected in zip(results, gradient.split(sizes, -1), strict=True):
        torch.testing.assert_close(own_value, value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own_gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_many_observations_are_summed_in_float64(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    y, x = torch.randn(2, 100_001, generator=generator), torch.randn(2, 100_001, generator=generator)
    cost = get_cost(name)
    sums = cost.sums(y, x)
    assert {tensor.dtype for tensor in sums} == {torch.float64}
    assert {tensor.dtype for tensor in cost.sums(y[:, 1:], x[:, 1:])} == {torch.float32}
    np.testing.assert_allclose(cost.matrix(sums, cost.energy(x.double())).numpy(), oracle(name, y, x), rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["plain", "dead", "large means"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_of_the_sums_of_all_parts_is_that_of_the_whole(name: str, kind: str, dtype: torch.dtype) -> None:
    """What the processes of a global batch compute once they know each other's sums."""
    cost, rows, columns = get_cost(name), 6, 9
    y, x = draw(rows, OBSERVATIONS), draw(columns, OBSERVATIONS, seed=1)
    if kind == "dead":
        y[2], x[3], x[4] = 0.3, 0.0, -2.0
    if kind == "large means":
        y, x = y + 50, x + 50
    plan = Plan.of(draw_plan(rows, columns).to(dtype))
    expected_value, expected_gradient = value_of(cost, y, x, plan.matrix.double())
    y, x = y.to(dtype), x.to(dtype)
    reference = y[:, :5].mean(1, keepdim=True), x[:, :5].mean(1, keepdim=True)
    parts = [(y[:, :5], x[:, :5]), (y[:, 5:], x[:, 5:])]
    sums = [sum(pair) for pair in zip(*(cost.sums(*part, reference) for part in parts), strict=True)]
    energy = sum(cost.energy(part[1]) for part in parts)
    before = [part.clone() for part in sums]
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-5}
    gradients = []
    for part in parts:
        value, gradient = cost.value_of_sums(*part, plan, sums, energy, reference)
        assert value.dtype == gradient.dtype == dtype
        torch.testing.assert_close(value.double(), expected_value, **tolerance)
        gradients.append(gradient.double())
    torch.testing.assert_close(torch.cat(gradients, 1), expected_gradient, **tolerance)
    assert all(torch.equal(now, then) for now, then in zip(sums, before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_any_length_have_sums_of_the_same_types(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that send different types do not understand each other."""
    cost = get_cost(name)
    y, x = draw(6, 40).float(), draw(9, 40, seed=1).float()
    reference = y.mean(1, keepdim=True), x.mean(1, keepdim=True)
    short = cost.sums(y, x, reference)
    monkeypatch.setattr("lightning_otrt.transport.tensors.FLOAT64_OBSERVATIONS", 30)
    long = cost.sums(y, x, reference)
    assert [part.dtype for part in long] == [part.dtype for part in short]
    torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-4)


def test_sums_of_two_types_decay_alike() -> None:
    double, single = torch.ones(3, dtype=torch.float64), torch.ones(3)
    sums = decay_and_add(
        [double, single], 0.98, [torch.zeros_like(double), torch.zeros_like(single)], torch.tensor(True)
    )
    assert sums[0].tolist() == sums[1].tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [0, 1])
def test_a_batch_that_is_not_finite_adds_nothing(name: str, side: int) -> None:
    cost = get_cost(name)
    y, x = draw(4, OBSERVATIONS), draw(3, OBSERVATIONS, seed=1)
    reference = y.mean(1, keepdim=True), x.mean(1, keepdim=True)
    running = cost.sums(y, x, reference)
    before = [part.clone() for part in running]
    bad = [y.clone(), x.clone()]
    bad[side][1, 2] = torch.nan
    after = cost.accumulate(running, 0.5, *bad, reference)
    assert all(torch.equal(now, then) for now, then in zip(after, before, strict=True))
    # The general way, which costs without one of their own take.
    after = Cost.accumulate(cost, [part.clone() for part in before], 0.5, *bad, reference)
    assert all(torch.equal(now, then) for now, then in zip(after, before, strict=True))
    fed = Cost.accumulate(cost, [part.clone() for part in before], 0.5, y, x, reference)
    torch.testing.assert_close(fed, [1.5 * part for part in before])
