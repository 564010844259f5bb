"""The value of the metric: that of all observations at once, exact, of constant memory; and its errors."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from analysis.metric_problem import COSTS, SIZES, M, N, batches, cost_matrix, double, exact_distance, neurons
from torch import Tensor

from lightning_otrt import transport_distance
from lightning_otrt.analysis.metric import NeuronTransportDistance
from lightning_otrt.transport.euclidean import SquaredEuclideanCost

PLANS = ("sinkhorn", "exact", "uniform", "random")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("cost", COSTS)
def test_batches_equal_all_observations_at_once(cost: str, plan: str) -> None:
    metric = double(cost=cost, plan=plan, seed=3)
    for student, teacher in batches():
        metric.update(student, teacher)
    student, teacher = neurons(sum(SIZES))
    expected = transport_distance(student.double(), teacher.double(), cost=cost, plan=plan, seed=3)
    result = metric.transport()
    torch.testing.assert_close(metric.compute(), expected.value, rtol=0, atol=1e-10)
    for name in ("plan", "cost", "marginal_error", "student_marginal_error", "entropy"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=0, atol=1e-8)
    np.testing.assert_allclose(result.cost.numpy(), cost_matrix(student, teacher, cost), atol=1e-8)


def test_identity_plan_of_equal_widths() -> None:
    metric = NeuronTransportDistance(N, N, plan="identity")
    student, _ = neurons(50)
    metric.update(student, student)
    assert metric.compute().item() == pytest.approx(0, abs=1e-7)
    assert metric.transport().off_identity == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("cost", COSTS)
def test_independent_of_batching_and_order(cost: str) -> None:
    student, teacher = neurons(120)
    order = torch.randperm(120)
    one, many = double(cost=cost, plan="exact"), double(cost=cost, plan="exact")
    one.update(student, teacher)
    for index in order.split(7):
        many.update(student[:, index], teacher[:, index])
    torch.testing.assert_close(one.compute(), many.compute(), rtol=0, atol=1e-12)


def test_one_update_larger_than_a_chunk() -> None:
    student, teacher = neurons(40_000)
    metric = double(plan="exact")
    metric.update(student, teacher)
    assert metric.compute().item() == pytest.approx(exact_distance(student, teacher, "correlation"), abs=1e-10)


@pytest.mark.parametrize(("ratio", "tolerance"), [(1e2, 1e-9), (1e3, 1e-7), (1e4, 1e-5)])
def test_means_large_against_deviations(ratio: float, tolerance: float) -> None:
    student, teacher = neurons(20_000, offset=ratio)
    metric = NeuronTransportDistance(N, M)
    for index in torch.arange(20_000).split(50):
        metric.update(student[:, index], teacher[:, index])
    error = np.abs(metric.transport().cost.numpy() - cost_matrix(student, teacher, "correlation")).max()
    assert error < tolerance


def test_dead_neurons() -> None:
    student, teacher = neurons(60)
    student[0] = 0
    teacher[:2] = 0
    metric = double(plan="exact")
    for part in range(0, 60, 20):
        metric.update(student[:, part : part + 20], teacher[:, part : part + 20])
    cost = metric.transport().cost
    assert cost[0].tolist() == [0, 0] + [1] * (M - 2)
    assert cost[1:, 0].tolist() == [1] * (N - 1)
    torch.testing.assert_close(cost, transport_distance(student.double(), teacher.double(), plan="exact").cost)


def test_constant_layers_are_at_distance_zero() -> None:
    metric = NeuronTransportDistance(N, M)
    student, teacher = (torch.randn(width, 1).expand(width, 7) for width in (N, M))
    for _ in range(500):
        metric.update(student, teacher)
    assert metric.compute() == 0


def test_no_rotation_has_a_negative_distance() -> None:
    """Rounding alone would give -2.2e-16 for most of these."""
    for seed in range(10):
        teacher = torch.randn(N, 50, generator=torch.Generator().manual_seed(seed))
        metric = NeuronTransportDistance(N, N, plan="orthogonal")
        metric.set_dtype(torch.float64)
        metric.update(teacher.flip(0), teacher)
        assert 0 <= metric.compute() < 1e-12


def test_memory_does_not_grow_with_the_data() -> None:
    metric = NeuronTransportDistance(64, 32)
    before = metric.sums.shape
    student, teacher = torch.randn(64, 10_000), torch.randn(32, 10_000)
    for _ in range(100):
        metric.update(student, teacher)
    assert metric.sums.shape == before
    assert metric.sums.numel() == 64 * 32 + 2 * (64 + 32) + 3
    assert metric.sums[0] == 1_000_000
    state = len(pickle.dumps(metric))
    assert state < 8 * 3 * metric.sums.numel() + 10_000
    metric.update(student, teacher)
    assert len(pickle.dumps(metric)) == state, "the bytes of everything that it holds"
    tensors = [value for value in vars(metric).values() if isinstance(value, Tensor | list) and len(value) > 10]
    assert len(tensors) == 1


def test_inputs_are_neither_kept_nor_changed() -> None:
    student, teacher = (tensor.requires_grad_() for tensor in neurons(40))
    copies = student.detach().clone(), teacher.detach().clone()
    metric = NeuronTransportDistance(N, M)
    value = metric(student, teacher)
    assert not value.requires_grad
    assert not metric.sums.requires_grad
    assert torch.equal(student, copies[0])
    assert torch.equal(teacher, copies[1])


def test_compute_before_update_warns_and_is_nan() -> None:
    metric = NeuronTransportDistance(N, M)
    with pytest.warns(UserWarning, match="was called before the ``update`` method"):
        assert metric.compute().isnan()
    with (
        pytest.warns(UserWarning, match="was called before the ``update`` method"),
        pytest.raises(ValueError, match=r"There is no transport plan: .* needs at least 3 observations"),
    ):
        NeuronTransportDistance(N, M).transport()


def test_too_few_observations_warn_and_are_counted() -> None:
    metric = double(plan="exact")
    student, teacher = neurons(10)
    with pytest.warns(UserWarning, match="has seen 2 observations, too few for cost='correlation', which needs 3"):
        assert metric(student[:, :2], teacher[:, :2]).isnan()
    metric.update(student[:, 2:], teacher[:, 2:])
    assert metric.compute().item() == pytest.approx(exact_distance(student, teacher, "correlation"), abs=1e-8)
    single = NeuronTransportDistance(N, M, cost="euclidean")
    single.update(student[:, :1], teacher[:, :1])
    assert single.compute() > 0


def test_empty_batches_count_nothing() -> None:
    metric = NeuronTransportDistance(N, M)
    metric.update(torch.zeros(N, 0), torch.zeros(M, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric.compute().isnan()


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"num_student_neurons": 0}, ValueError, "`num_student_neurons` to be a positive integer, but got 0"),
        ({"num_teacher_neurons": 2.0}, TypeError, "`num_teacher_neurons` to be a positive integer, but got 2.0"),
        ({"num_teacher_neurons": True}, TypeError, "`num_teacher_neurons` to be a positive integer, but got True"),
        ({"cost": "cosine"}, ValueError, "argument `cost` to be one of"),
        ({"cost": torch.cdist}, TypeError, "adds up sums over observations.*transport_distance"),
        ({"cost": SquaredEuclideanCost()}, TypeError, "argument `cost` to be a name"),
        ({"plan": "static"}, ValueError, "argument `plan` to be one of"),
        ({"plan": "identity"}, ValueError, "needs equal widths, but the metric has 6 student and 9 teacher neurons"),
        ({"epsilon": 0.0}, ValueError, "argument `epsilon`"),
        ({"seed": 0.5}, TypeError, "argument `seed` to be an integer, but got 0.5"),
        ({"unknown": 1}, ValueError, "Unexpected keyword arguments: `unknown`"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        NeuronTransportDistance(**{"num_student_neurons": N, "num_teacher_neurons": M} | kwargs)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "match"),
    [
        (torch.zeros(40, N), torch.zeros(M, 40), ValueError, r"`num_student_neurons`, but got \(40, 6\).*Transpose it"),
        (torch.zeros(N, 40), torch.zeros(M + 1, 40), ValueError, "with 9 neurons, as set by `num_teacher_neurons`"),
        (torch.zeros(2, N, 40), torch.zeros(2, M, 40), ValueError, r"but got \(2, 6, 40\)"),
        (torch.zeros(N, 40), torch.zeros(M, 39), ValueError, "the same number of observations"),
        (torch.zeros(N, 40).int(), torch.zeros(M, 40), TypeError, "`student` to be a floating-point tensor, but got"),
        (torch.zeros(N, 40), [[0.0]], TypeError, "`teacher` to be a floating-point tensor, but got list"),
        (torch.full((N, 40), torch.nan), torch.zeros(M, 40), ValueError, "`student` has 240 NaN or infinite values"),
        (torch.zeros(N, 40), torch.full((M, 40), torch.inf), ValueError, "`teacher` has 360 NaN or infinite values"),
    ],
)
def test_bad_inputs_leave_the_state(student: Any, teacher: Any, error: type[Exception], match: str) -> None:
    metric = NeuronTransportDistance(N, M)
    metric.update(*neurons(40))
    before = metric.sums.clone()
    with pytest.raises(error, match=match):
        metric.update(student, teacher)
    assert torch.equal(metric.sums, before)
