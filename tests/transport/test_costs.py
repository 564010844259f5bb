"""Ground costs against scipy, and their closed-form values and gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from lightning_otrt.transport.correlation import CorrelationCost
from lightning_otrt.transport.cost import Cost, Plan, Rounds, Sums, ValueAndGradient, remember
from lightning_otrt.transport.distance import run_rounds
from lightning_otrt.transport.euclidean import EuclideanCost, SquaredEuclideanCost
from lightning_otrt.transport.named_costs import CallableCost, get_cost

NAMES = ("correlation", "euclidean", "sqeuclidean")
WIDTHS = ((3, 7), (6, 6), (8, 5), (1, 4), (4, 1))
OBSERVATIONS = 12


def oracle(name: str, y: Tensor, x: Tensor) -> np.ndarray:
    """The cost of one pair in float64, by scipy."""
    student, teacher = y.double().numpy(), x.double().numpy()
    if name == "correlation":
        return cdist(student, teacher, "correlation")
    scale = np.sqrt((teacher**2).mean() * teacher.shape[1])
    return cdist(student, teacher) / scale if name == "euclidean" else cdist(student, teacher, "sqeuclidean") / scale**2


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Neurons of different means and scales, as layers have them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    mean, scale = torch.randn((2, *shape[:-1], 1), generator=generator, dtype=torch.float64)
    return (values * scale.exp() + mean).to(dtype)


def draw_plan(*shape: int, seed: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    """A plan that has not converged: its masses are not uniform and it does not sum to 1."""
    plan = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (plan / (shape[-1] * shape[-2])).to(dtype)


def matrix_of(cost: Cost, y: Tensor, x: Tensor) -> Tensor:
    return cost.matrix(cost.sums(y, x), cost.energy(x))


def value_of(cost: Cost, y: Tensor, x: Tensor, plan: Tensor) -> ValueAndGradient:
    return cost.value(y, x, Plan.of(plan), cost.energy(x))


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


@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-4, 1e-2])
def test_euclidean_floor_changes_the_gradient_only(distance: float) -> None:
    x = draw(5, OBSERVATIONS, seed=1)
    y = draw(6, OBSERVATIONS)
    y[0] = x[2]
    y[0, 0] += distance
    plan = draw_plan(6, 5)
    scale = float((x**2).mean() * OBSERVATIONS)
    # scipy's differences, not its Gram matrix, keep tiny distances exact.
    exact = torch.from_numpy(oracle("euclidean", y, x))
    value, gradient = value_of(EuclideanCost(), y, x, plan)
    assert value.item() == pytest.approx(float((plan * exact).sum()), abs=1e-8)
    weights = plan / exact.clamp_min(0.01 * exact.mean())
    expected = (weights[:, :, None] * (y[:, None] - x[None])).sum(1) / scale
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)
    assert (gradient.norm(dim=1) <= plan.sum(1) / scale**0.5 * (1 + 1e-9)).all()
    matched = torch.zeros(6, 5, dtype=torch.float64)
    matched[0, 2] = 0.2
    pull = value_of(EuclideanCost(), y, x, matched)[1]
    assert pull[1:].abs().max() == 0
    floor = 0.01 * float(exact.mean())
    reach = float(exact[0, 2])
    # Rounding gives two equal neurons a distance of about 1e-8, so the direction at zero is not exactly zero.
    assert pull[0].norm().item() == pytest.approx(0.2 / scale**0.5 * min(1.0, reach / floor), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_all_neurons_equal_gives_zero_and_no_gradient(name: str) -> None:
    y = draw(1, OBSERVATIONS, dtype=torch.float32).expand(4, -1)
    value, gradient = value_of(get_cost(name), y, y, torch.eye(4) / 4)
    assert value.abs().item() < 1e-3
    assert gradient.isfinite().all()
    assert gradient.abs().max() < (1e-3 if name != "euclidean" else 0.25)


DEAD: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda noise: 0 * noise,
    "0.1": lambda noise: 0 * noise + 0.1,
    "-1234.567": lambda noise: 0 * noise - 1234.567,
    "tiny": lambda noise: 1e-7 * noise,
    "3 and noise": lambda noise: 3 + 1e-7 * noise,
    "share": lambda noise: 4e-4 * noise,
}


@pytest.mark.parametrize("kind", DEAD)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_neurons(kind: str, side: str, dtype: torch.dtype) -> None:
    noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y = torch.randn(6, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    dead_y, dead_x = torch.zeros(6, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    if side != "teacher":
        y[:2], dead_y[:2] = DEAD[kind](noise), True
    if side != "student":
        x[3:], dead_x[3:] = DEAD[kind](noise), True
    y, x, plan = y.to(dtype), x.to(dtype), draw_plan(6, 5, dtype=dtype)
    matrix = matrix_of(CorrelationCost(), y, x)
    value, gradient = value_of(CorrelationCost(), y, x, plan)
    both, either = dead_y[:, None] & dead_x, dead_y[:, None] ^ dead_x
    assert (matrix[both] == 0).all()
    assert (matrix[either] == 1).all()
    live = oracle("correlation", y[~dead_y], x[~dead_x])
    np.testing.assert_allclose(matrix[~dead_y][:, ~dead_x].numpy(), live, atol=1e-5)
    torch.testing.assert_close(value, (plan * matrix).sum(), rtol=1e-5, atol=1e-6)
    assert (gradient[dead_y] == 0).all()
    norms = (y - y.mean(1, keepdim=True)).norm(dim=1)[~dead_y]
    assert (gradient[~dead_y].norm(dim=1) <= plan.sum(1)[~dead_y] / norms * (1 + 1e-5)).all()
    assert gradient[~dead_y].abs().max() > 0


@pytest.mark.parametrize("kind", ["zero", "0.1", "-1234.567", "3 and noise"])
@pytest.mark.parametrize("teacher_dead", [True, False])
def test_layer_that_is_dead_throughout(kind: str, teacher_dead: bool) -> None:
    """The rounding of a constant is no activation, even where no live neuron shows how small it is."""
    y = DEAD[kind](torch.randn(6, 100)) * torch.linspace(0.3, 1.7, 6)[:, None]
    x = DEAD[kind](torch.randn(4, 100)) * torch.linspace(0.2, 2.0, 4)[:, None] if teacher_dead else torch.randn(4, 100)
    plan = torch.full((6, 4), 1 / 24)
    expected = 0.0 if teacher_dead else 1.0
    value, gradient = value_of(CorrelationCost(), y, x, plan)
    assert value.item() == pytest.approx(expected, abs=1e-5)
    assert (gradient == 0).all()
    torch.testing.assert_close(matrix_of(CorrelationCost(), y, x), torch.full((6, 4), expected))
    cost, reference = CorrelationCost(), (y[:, :1], x[:, :1])
    halves = [cost.sums(y[:, part], x[:, part], reference) for part in (slice(0, 37), slice(37, 100))]
    added = cost.matrix([first + second for first, second in zip(*halves, strict=True)], cost.energy(x))
    torch.testing.assert_close(added, torch.full((6, 4), expected))
    [(value, gradient), *_] = over_processes(cost, y, x, plan, (40, 60))
    assert value.item() == pytest.approx(expected, abs=1e-5)
    assert (gradient == 0).all()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_correlation_ignores_the_scale_of_a_layer(side: str, factor: float) -> None:
    y, x = torch.randn(6, 64), torch.randn(5, 64)
    scaled = (y * factor, x) if side == "student" else (y, x * factor)
    expected, plan = matrix_of(CorrelationCost(), y, x), draw_plan(6, 5, dtype=torch.float32)
    torch.testing.assert_close(matrix_of(CorrelationCost(), *scaled), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value_of(CorrelationCost(), *scaled, plan)[0], (expected * plan).sum())


@pytest.mark.parametrize("referenced", [True, False])
def test_float32_keeps_correlations_of_large_means(referenced: bool) -> None:
    """At a mean 1000 times the deviation raw float32 moments are 0.36 off."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(12, 800, generator=generator)
    y = x[:9] + torch.randn(9, 800, generator=generator) + 1000
    x = x - 1000
    cost, expected = CorrelationCost(), oracle("correlation", y, x)
    # The reference is that of an earlier batch: near the means, but not at them.
    reference = (y[:, :100].mean(1, keepdim=True) + 0.5, x[:, :100].mean(1, keepdim=True) - 0.5) if referenced else None
    matrix = cost.matrix(cost.sums(y, x, reference), cost.energy(x))
    np.testing.assert_allclose(matrix.numpy(), expected, atol=2e-4)
    plan = draw_plan(9, 12, dtype=torch.float32)
    assert value_of(cost, y, x, plan)[0].item() == pytest.approx(float((plan.numpy() * expected).sum()), abs=1e-4)


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


def test_callable_sums_weigh_matrices_by_observations() -> None:
    cost = CallableCost(torch.cdist)
    parts = [(draw(4, count), draw(5, count, seed=1)) for count in (3, 9)]
    sums = [a + b for a, b in zip(*(cost.sums(*part) for part in parts), strict=True)]
    expected = 0.25 * torch.cdist(*parts[0]) + 0.75 * torch.cdist(*parts[1])
    torch.testing.assert_close(cost.matrix(sums, cost.energy(parts[0][1])), expected)


def over_processes(cost: Cost, y: Tensor, x: Tensor, plan: Tensor, sizes: tuple[int, ...]) -> list[ValueAndGradient]:
    """Run one generator a process in lockstep; each is sent new tensors that sum what all of them yielded."""
    parts = list(zip(y.split(sizes, -1), x.split(sizes, -1), strict=True))
    rounds: list[Rounds] = [cost.shared_value(a, b, Plan.of(plan), cost.energy(b)) for a, b in parts]
    results: list[ValueAndGradient] = []
    asked: list[Sums] = [next(process) for process in rounds]
    while True:
        # Sent as clones: two processes share no memory, and a generator may work in place.
        total = [torch.stack(tensors).sum(0) for tensors in zip(*asked, strict=True)]
        asked = []
        for process in rounds:
            try:
                asked.append(process.send([tensor.clone() for tensor in total]))
            except StopIteration as stop:
                results.append(stop.value)
        if results:
            assert not asked, "the processes disagree about the number of rounds"
            return results


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


def test_processes_in_float32_keep_correlations_of_large_means() -> None:
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(6, 600, generator=generator) + 1000
    x = y[:5] + torch.randn(5, 600, generator=generator)
    plan = draw_plan(6, 5, dtype=torch.float32)
    expected = float((plan.numpy() * oracle("correlation", y, x)).sum())
    gradient = value_of(CorrelationCost(), y.double(), x.double(), plan.double())[1]
    results = over_processes(CorrelationCost(), y, x, plan, (100, 200, 300))
    for (own_value, own_gradient), part in zip(results, gradient.split((100, 200, 300), -1), strict=True):
        assert own_value.item() == pytest.approx(expected, abs=1e-4)
        torch.testing.assert_close(own_gradient.double(), part, rtol=1e-2, atol=float(part.abs().max()) * 2e-3)


def test_run_rounds_reduces_all_pairs_at_once() -> None:
    """Two processes that see the same: the value of one, and half its gradient each. Costs of 1 and 2 rounds mix."""
    pairs = [(get_cost(name), draw(4, 12, seed=3 * k), draw(5, 12, seed=3 * k + 1)) for k, name in enumerate(NAMES)]
    plan = draw_plan(4, 5)
    calls: list[int] = []

    def twice(sums: Sums) -> Sums:
        calls.append(len(sums))
        return [2 * tensor for tensor in sums]

    rounds = [cost.shared_value(y, x, Plan.of(plan), cost.energy(x)) for cost, y, x in pairs]
    for (value, gradient), pair in zip(run_rounds(rounds, twice), pairs, strict=True):
        expected_value, expected_gradient = value_of(*pair, plan)
        torch.testing.assert_close(value, expected_value, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, expected_gradient / 2, rtol=1e-10, atol=1e-14)
    assert len(calls) == 2


@pytest.mark.parametrize("cost", [EuclideanCost(), SquaredEuclideanCost()])
def test_teacher_without_activity_has_no_scale(cost: Cost) -> None:
    y, x = draw(4, OBSERVATIONS), torch.zeros(3, OBSERVATIONS, dtype=torch.float64)
    power = 1 if isinstance(cost, EuclideanCost) else 2
    expected = (y.square().mean(1).sqrt() ** power)[:, None].expand(4, 3)
    torch.testing.assert_close(matrix_of(cost, y, x), expected)
    value, gradient = value_of(cost, y, x, draw_plan(4, 3))
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_many_observations_are_summed_in_float64(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    y, x = torch.randn(2, 100_001, generator=generator), torch.randn(2, 100_001, generator=generator)
    cost = get_cost(name)
    sums = cost.sums(y, x)
    assert {tensor.dtype for tensor in sums} == {torch.float64}
    assert {tensor.dtype for tensor in cost.sums(y[:, 1:], x[:, 1:])} == {torch.float32}
    np.testing.assert_allclose(cost.matrix(sums, cost.energy(x.double())).numpy(), oracle(name, y, x), rtol=1e-9)


@pytest.mark.parametrize("name", ["euclidean", "sqeuclidean"])
def test_common_offset_of_all_neurons_costs_no_precision(name: str) -> None:
    y, x = torch.randn(5, 64), torch.randn(6, 64)
    offset = 1000 + 100 * torch.randn(64)
    expected = oracle(name, y + offset, x + offset)
    np.testing.assert_allclose(matrix_of(get_cost(name), y + offset, x + offset).numpy(), expected, rtol=1e-4)


def test_callable_value_and_gradient_are_those_of_autograd() -> None:
    y, x, plan = draw(2, 4, 6), draw(2, 5, 6, seed=1), draw_plan(2, 4, 5)
    leaf = y.clone().requires_grad_()
    expected = (plan * torch.cdist(leaf, x)).sum((1, 2))
    expected.sum().backward()
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            value, gradient = value_of(CallableCost(torch.cdist), y, x, plan)
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
        CallableCost(function).sums(draw(4, 6), draw(5, 6))


def test_callable_without_gradient() -> None:
    cost = CallableCost(lambda y, x: torch.cdist(y.detach(), x))
    with pytest.raises(ValueError, match="does not depend on the student neurons in a differentiable way"):
        value_of(cost, draw(4, 6), draw(5, 6), draw_plan(4, 5))


def test_get_cost() -> None:
    assert [type(get_cost(name)) for name in NAMES] == [CorrelationCost, EuclideanCost, SquaredEuclideanCost]
    cost = EuclideanCost()
    assert get_cost(cost) is cost
    assert isinstance(get_cost(torch.cdist), CallableCost)
    assert [get_cost(name).min_observations for name in NAMES] == [3, 1, 1]
    assert [get_cost(name).scaled for name in NAMES] == [False, True, True]
    with pytest.raises(ValueError, match=r"`cost` to be one of \['correlation', .*\] or a callable, but got 'cosine'"):
        get_cost("cosine")
    with pytest.raises(TypeError, match="a name or a callable, but got int"):
        get_cost(3)  # type: ignore[arg-type]


# --- from known sums -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["constant", "live"])
def test_value_of_sums_far_from_their_reference(kind: str) -> None:
    """Float32 tells a neuron that moves a little from one that does not, however far the last batches were."""
    cost = get_cost("correlation")
    y, x = draw(6, 40).float(), draw(9, 40, seed=1).float()
    reference = y.mean(1, keepdim=True), x.mean(1, keepdim=True)
    y[2] = 7.3 if kind == "constant" else 7.3 + 1e-3 * y[2]
    x[4] = -5.1 if kind == "constant" else -5.1 + 1e-3 * x[4]
    plan = Plan.of(draw_plan(6, 9).float())
    expected_value, expected_gradient = value_of(cost, y.double(), x.double(), plan.matrix.double())
    parts = [(y[:, :25], x[:, :25]), (y[:, 25:], x[:, 25:])]
    sums = [sum(pair) for pair in zip(*(cost.sums(*part, reference) for part in parts), strict=True)]
    found = [cost.value_of_sums(*part, plan, sums, cost.energy(x), reference) for part in parts]
    gradient = torch.cat([part for _, part in found], 1).double()
    np.testing.assert_allclose(found[0][0].item(), expected_value, rtol=2e-3)
    for row in range(6):
        scale = expected_gradient[row].norm()
        torch.testing.assert_close(gradient[row], expected_gradient[row], rtol=0, atol=2e-3 * scale.item())


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
    sums = remember([double, single], 0.98, [torch.zeros_like(double), torch.zeros_like(single)], torch.tensor(True))
    assert sums[0].tolist() == sums[1].tolist()


def test_moments_far_from_their_reference_leave_neurons_alive() -> None:
    y, x = draw(5, OBSERVATIONS) + 1000, draw(4, OBSERVATIONS, seed=1) - 1000
    zeros = torch.zeros(5, 1, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    cost = get_cost("correlation")
    found = cost.matrix(cost.sums(y, x, zeros), cost.energy(x))
    np.testing.assert_allclose(found.numpy(), oracle("correlation", y, x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rows", [3, 60])
def test_rounding_of_a_constant_is_measured_by_its_observations(rows: int) -> None:
    """A neuron that is constant up to rounding is dead, one that moves by ten times as much is alive."""
    observations = 20
    y = torch.full((rows, observations), 1000.0)
    limit = 1000 * 4 * torch.finfo(torch.float32).eps
    signs = torch.tensor([1.0, -1.0]).repeat(observations // 2)
    y[0] += 0.5 * limit * signs
    y[1] += 10 * limit * signs
    sums = get_cost("correlation").sums(y, y.clone(), (torch.full((rows, 1), 1000.0),) * 2)
    assert sums[3][0] == 0
    assert sums[3][1] > 0
    assert (sums[5][0] == 0).all()


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
