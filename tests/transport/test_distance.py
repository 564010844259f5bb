"""The transport distance: its invariances, its gradients, its modes and its errors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_otrt import transport_distance
from lightning_otrt.transport.plans import random_plan
from lightning_otrt.transport.sinkhorn import sinkhorn_plan

COSTS = ("correlation", "euclidean", "sqeuclidean")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_dead_neurons(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    neurons = draw(rows, columns, dtype=dtype)
    neurons[:3] = 0
    neurons[3:5] = 2.3
    return neurons


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    ("plan", "dtype", "bound"), [("exact", torch.float64, 1e-6), ("sinkhorn", torch.float32, 1e-3)]
)
def test_permuted_copy_is_at_distance_zero(cost: str, plan: str, dtype: torch.dtype, bound: float) -> None:
    teacher = with_dead_neurons(48, 200, dtype)
    order = torch.randperm(48)
    result = transport_distance(teacher[order], teacher, cost=cost, plan=plan)
    assert abs(result.value.item()) <= bound
    live = order >= 5
    matched = result.plan[live][:, 5:] > 0.5 / 48
    assert torch.equal(matched.int().argmax(1) + 5, order[live])


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("plan", ["exact", "sinkhorn"])
def test_order_of_neurons_does_not_matter(cost: str, plan: str) -> None:
    student, teacher = draw(20, 40), draw(30, 40, seed=1)
    order_s, order_t = torch.randperm(20), torch.randperm(30)
    result = transport_distance(student, teacher, cost=cost, plan=plan)
    moved = transport_distance(student[order_s], teacher[order_t], cost=cost, plan=plan)
    torch.testing.assert_close(moved.value, result.value, rtol=1e-4, atol=0)
    if plan == "sinkhorn":
        # An exact plan need not be unique.
        torch.testing.assert_close(moved.plan, result.plan[order_s][:, order_t], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(moved.cost, result.cost[order_s][:, order_t], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("cost", "plan"), [
    *((cost, "sinkhorn") for cost in (*COSTS, torch.cdist)),
    *(("correlation", plan) for plan in ("exact", "uniform", "random", "identity")),
])  # fmt: skip
def test_batch_is_the_loop(cost: Any, plan: str) -> None:
    student, teacher = draw(3, 16, 40).requires_grad_(), draw(3, 16, 40, seed=1)
    result = transport_distance(student, teacher, cost=cost, plan=plan, seed=5)
    result.value.sum().backward()
    assert student.grad is not None
    for index in range(3):
        leaf = student[index].detach().requires_grad_()
        single = transport_distance(leaf, teacher[index], cost=cost, plan=plan, seed=5)
        single.value.backward()
        # Solved together, the pair that converges last gives all of them its iterations.
        loose = 2e-2 if plan == "sinkhorn" else 1e-4
        for name in ("value", "cost", "entropy", "off_identity"):
            ours, theirs = getattr(result, name)[index], getattr(single, name)
            torch.testing.assert_close(ours, theirs, rtol=loose, atol=1e-6, msg=name)
        torch.testing.assert_close(result.plan[index], single.plan, rtol=0, atol=loose * single.plan.max().item())
        torch.testing.assert_close(student.grad[index], leaf.grad, rtol=0, atol=loose * leaf.grad.abs().max().item())
        assert single.marginal_error.shape == single.value.shape == ()
        assert single.marginal_error <= 1.1e-3


@pytest.mark.parametrize("cost", [*COSTS, torch.cdist])
@pytest.mark.parametrize("plan", ["sinkhorn", "exact"])
def test_value_is_the_transported_cost_and_not_negative(cost: Any, plan: str) -> None:
    result = transport_distance(draw(12, 30), draw(18, 30, seed=1), cost=cost, plan=plan)
    torch.testing.assert_close(result.value, (result.plan * result.cost).sum(), rtol=1e-5, atol=0)
    assert result.value > 0
    uniform = transport_distance(draw(12, 30), draw(18, 30, seed=1), cost=cost, plan="uniform").value
    assert result.value < uniform
    torch.testing.assert_close(uniform, result.cost.mean())


def test_plan_is_the_one_asked_for() -> None:
    student, teacher = draw(12, 30), draw(12, 30, seed=1)
    cost = transport_distance(student, teacher).cost
    result = transport_distance(student, teacher, epsilon=0.05)
    torch.testing.assert_close(result.plan, sinkhorn_plan(cost[None], 0.05).matrix[0])
    assert torch.equal(transport_distance(student, teacher, epsilon=Fraction(1, 20)).plan, result.plan)
    assert torch.equal(transport_distance(student, teacher, plan="random", seed=3).plan, random_plan(12, 12, 3))
    assert torch.equal(transport_distance(student, teacher, plan="identity").plan, torch.eye(12) / 12)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7)])
def test_gradient_is_that_of_the_value_with_the_plan_held_fixed(cost: str, shape: tuple[int, ...]) -> None:
    student = draw(*shape, dtype=torch.float64).requires_grad_()
    teacher = draw(*shape[:-2], 4, 7, seed=1, dtype=torch.float64).requires_grad_()
    weights = torch.rand(shape[:-2], dtype=torch.float64) + 0.5
    result = transport_distance(student, teacher, cost=cost)
    (weights * result.value).sum().backward()
    assert teacher.grad is None
    assert not any(tensor.requires_grad for tensor in (result.plan, result.cost, result.marginal_error))
    # Autograd through the cost, spelled out, with this plan as a constant.
    leaf, fixed = student.detach().requires_grad_(), teacher.detach()
    if cost == "correlation":
        unit = [torch.nn.functional.normalize(t - t.mean(-1, keepdim=True), dim=-1) for t in (leaf, fixed)]
        matrix = 1 - unit[0] @ unit[1].mT
    else:
        scale = fixed.square().mean((-2, -1), keepdim=True) * 7
        squared = (leaf[..., :, None, :] - fixed[..., None, :, :]).square().sum(-1) / scale
        matrix = squared.sqrt() if cost == "euclidean" else squared
    (weights * (result.plan * matrix).sum((-2, -1))).sum().backward()
    torch.testing.assert_close(student.grad, leaf.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("cost", [*COSTS, torch.cdist])
def test_dtypes(dtype: torch.dtype, cost: Any) -> None:
    student, teacher = draw(12, 30, dtype=dtype).requires_grad_(), draw(8, 30, seed=1, dtype=dtype)
    result = transport_distance(student, teacher, cost=cost)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {result.value.dtype, result.plan.dtype, result.cost.dtype} == {wide}
    result.value.backward()
    assert student.grad is not None
    assert student.grad.dtype == dtype
    reference = student.detach().to(wide).requires_grad_()
    expected = transport_distance(reference, teacher.to(wide), cost=cost)
    expected.value.backward()
    # In the narrow type the values would differ by 1e-3, and gradients are rounded to it.
    torch.testing.assert_close(result.value, expected.value, rtol=1e-5, atol=0)
    torch.testing.assert_close(student.grad, reference.grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_mixed_dtypes_take_the_wider() -> None:
    student = draw(12, 30).requires_grad_()
    result = transport_distance(student, draw(8, 30, seed=1, dtype=torch.float64))
    assert result.value.dtype == torch.float64
    result.value.backward()
    assert student.grad is not None
    assert student.grad.dtype == torch.float32


@pytest.mark.parametrize("cost", [*COSTS, torch.cdist])
def test_autocast_changes_nothing(cost: Any) -> None:
    student, teacher = draw(12, 30), draw(8, 30, seed=1)
    expected = transport_distance(student, teacher, cost=cost)
    with torch.autocast("cpu", torch.bfloat16):
        result = transport_distance(student, teacher, cost=cost)
        assert torch.is_autocast_enabled("cpu")
    assert result.value.dtype == torch.float32
    # In bfloat16 both would differ by 1e-3 and more.
    torch.testing.assert_close(result.value, expected.value, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.plan, expected.plan, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("cost", "plan"), [
    *((cost, "sinkhorn") for cost in (*COSTS, torch.cdist)),
    ("correlation", "exact"),
])  # fmt: skip
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_autograd_mode_is_kept(cost: Any, plan: str, context: Callable[[], AbstractContextManager[Any]]) -> None:
    student, teacher = draw(12, 30).requires_grad_(), draw(8, 30, seed=1)
    expected = transport_distance(student.detach(), teacher, cost=cost, plan=plan).value
    bad = teacher.clone()
    bad[0, 0] = math.nan
    with context():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        result = transport_distance(student, teacher, cost=cost, plan=plan)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
        with pytest.raises(ValueError, match="`teacher` has 1 NaN"):
            transport_distance(student, bad, cost=cost, plan=plan)
        with pytest.raises(ValueError, match="agree"):
            transport_distance(student, teacher[:, 1:], cost=cost, plan=plan)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert result.value.requires_grad == (context is torch.enable_grad)
    torch.testing.assert_close(result.value.detach(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("cost", [*COSTS, torch.cdist])
def test_tensors_born_in_inference_mode(cost: Any) -> None:
    with torch.inference_mode():
        student, teacher = draw(12, 30), draw(8, 30, seed=1)
    result = transport_distance(student, teacher, cost=cost)
    expected = transport_distance(draw(12, 30), draw(8, 30, seed=1), cost=cost).value
    torch.testing.assert_close(result.value, expected, rtol=1e-5, atol=0)


def test_error_in_the_cost_of_a_user_leaves_modes_alone() -> None:
    def fail(student: Tensor, teacher: Tensor) -> Tensor:
        raise ArithmeticError("in the user's cost")

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ArithmeticError, match="in the user's cost"):
            transport_distance(draw(4, 6), draw(4, 6), cost=fail)
        assert torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


def test_value_survives_in_place_operations_of_the_user() -> None:
    student, teacher = draw(6, 12).requires_grad_(), draw(5, 12, seed=1)
    result = transport_distance(student, teacher)
    result.value.backward()
    again = student.detach().requires_grad_()
    second = transport_distance(again, teacher)
    teacher.zero_()
    second.plan.zero_()
    second.value.backward()
    torch.testing.assert_close(again.grad, student.grad)


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cost": "cosine"}, ValueError, r"`cost` to be one of .*'covariance'\] or a callable, but got 'cosine'"),
    ({"cost": 3}, TypeError, "`cost` to be one of .* or a callable, but got int"),
    ({"cost": lambda y, x: torch.cdist(y, x).T}, ValueError, r"shape \(6, 5\), but got \(5, 6\)"),
    ({"cost": lambda y, x: -torch.cdist(y, x)}, ValueError, "not to be negative, but its smallest value is -"),
    ({"cost": lambda y, x: torch.cdist(y, x) / 0}, ValueError, "The cost <function .* 30 NaN or infinite values of 30"),
    ({"cost": lambda y, x: torch.ones(6, 5)}, ValueError, "does not depend on the student neurons"),
    ({"plan": "static"}, ValueError, r"`plan` to be one of \['sinkhorn', .*'random_orthogonal'\], but got 'static'"),
    ({"plan": None}, ValueError, "`plan` to be one of .* but got None"),
    ({"plan": "identity"}, ValueError, "needs equal widths, but the pair has 6 student and 5 teacher neurons"),
    ({"epsilon": 0.0}, ValueError, "`epsilon` to lie between 0 and 1, but got 0.0"),
    ({"epsilon": 1.0}, ValueError, "at 1 the plan is uniform"),
    ({"epsilon": -0.1}, ValueError, "but got -0.1"),
    ({"epsilon": math.nan}, ValueError, "but got nan"),
    ({"epsilon": "0.01"}, ValueError, "but got '0.01'"),
    ({"seed": 1.5}, TypeError, "`seed`"),
    ({"student": [[1.0]]}, TypeError, "`student` to be a floating-point tensor, but got list"),
    ({"teacher": torch.ones(5, 8).long()}, TypeError, "`teacher` to be a floating-point tensor, but got torch.int64"),
    ({"student": torch.ones(6, 8) * 1j}, TypeError, "but got torch.complex64"),
    ({"student": torch.ones(8)}, ValueError, r"`student` to have the non-empty shape .* but got \(8,\)"),
    ({"teacher": torch.ones(1, 1, 5, 8)}, ValueError, r"`teacher` to have .* but got \(1, 1, 5, 8\)"),
    ({"teacher": torch.ones(0, 8)}, ValueError, r"`teacher` to have the non-empty .* but got \(0, 8\)"),
    ({"student": torch.ones(6, 0), "teacher": torch.ones(5, 0)}, ValueError, r"non-empty .* got \(6, 0\)"),
    ({"teacher": torch.ones(5, 9)}, ValueError, r"`student` \(6, 8\) and `teacher` \(5, 9\) to agree in all but"),
    ({"teacher": torch.ones(2, 5, 8)}, ValueError, r"`student` \(6, 8\) and `teacher` \(2, 5, 8\) to agree"),
    ({"student": torch.ones(6, 2), "teacher": torch.ones(5, 2)}, ValueError, "2 observations carry no correl.*least 3"),
    ({"student": torch.full((6, 8), math.inf)}, ValueError, r"`student` has 48 NaN or infinite values of 48 \(shape"),
    ({"teacher": torch.ones(5, 8, device="meta")}, ValueError, "`student` is on cpu but `teacher` on meta; move one"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), ERRORS)
def test_errors_say_what_is_wrong(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        transport_distance(**{"student": draw(6, 8), "teacher": draw(5, 8, seed=1), **arguments})


def test_two_observations_suffice_for_distances() -> None:
    for cost in ("euclidean", "sqeuclidean"):
        assert transport_distance(draw(6, 1), draw(5, 1, seed=1), cost=cost).value.isfinite()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    observations=st.integers(3, 12),
    batch=st.sampled_from([None, 1, 3]),
    cost=st.sampled_from(COSTS),
    plan=st.sampled_from(["sinkhorn", "exact", "uniform", "random"]),
    scale=st.sampled_from([0.0, 1e-4, 1.0, 1e4]),
    levels=st.sampled_from([None, 1, 3]),
)
def test_any_shape(
    rows: int,
    columns: int,
    observations: int,
    batch: int | None,
    cost: str,
    plan: str,
    scale: float,
    levels: int | None,
) -> None:
    lead = () if batch is None else (batch,)
    student, teacher = draw(*lead, rows, observations), draw(*lead, columns, observations, seed=1)
    if levels is not None:
        # Rounded, neurons coincide or die; scaled by 0, all of the student's do.
        student, teacher = (student * levels).round() / levels, (teacher * levels).round() / levels
    student = (student * scale).requires_grad_()
    # At this ε every problem converges within the iterations allowed.
    result = transport_distance(student, teacher, cost=cost, plan=plan, epsilon=0.05)
    assert result.value.shape == lead
    assert result.plan.shape == result.cost.shape == (*lead, rows, columns)
    torch.testing.assert_close(result.value, (result.plan * result.cost).sum((-2, -1)), rtol=1e-3, atol=1e-4)
    assert (result.value >= -1e-6).all()
    assert (result.student_marginal_error <= 1e-5).all()
    assert (result.marginal_error <= 1.1e-3).all()
    result.value.sum().backward()
    assert student.grad is not None
    assert student.grad.shape == student.shape
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("cost", ["correlation", "euclidean", "sqeuclidean"])
def test_values_whose_squares_overflow_are_refused(cost: str) -> None:
    """The correlation would else count neurons of infinite norm as dead."""
    y, x = torch.randn(5, 20), torch.randn(6, 20)
    with pytest.raises(ValueError, match=r"`teacher` has values as large as .*squares overflow torch\.float32"):
        transport_distance(y, x * 1e30, cost=cost)
    assert transport_distance(y.double(), x.double() * 1e30, cost=cost).value.isfinite()


@pytest.mark.parametrize(
    ("shape", "plan", "shown"),
    [
        ((), "exact", r"TransportResult\(0\.\d+, plan \(4, 6\)\)"),
        ((3,), "exact", r"TransportResult\(\(3,\) values, mean 0\.\d+, plan \(3, 4, 6\)\)"),
        ((), "orthogonal", r"TransportResult\(0\.\d+, rotation \(4, 6\)\)"),
    ],
)
def test_a_result_shows_its_value_and_no_entries(shape: tuple[int, ...], plan: str, shown: str) -> None:
    result = transport_distance(torch.randn(*shape, 4, 50, requires_grad=True), torch.randn(*shape, 6, 50), plan=plan)
    assert re.fullmatch(shown, repr(result))
