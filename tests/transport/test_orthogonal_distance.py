"""The orthogonal coupling in the functions that users call: `transport_distance` and the metric."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from lightning_otrt import NeuronTransportDistance, RepresentationTransfer, transport_distance

PLANS = ("orthogonal", "random_orthogonal")
COSTS = ("correlation", "covariance")
WIDTHS = ((6, 9), (7, 7), (9, 6))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    mean, scale = torch.randn((2, *shape[:-1], 1), generator=generator, dtype=torch.float64)
    return (values * scale.exp() + mean).to(dtype)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("plan", PLANS)
def test_gradient_is_that_of_the_value_with_the_targets_held(widths: tuple[int, int], cost: str, plan: str) -> None:
    student, teacher = draw(widths[0], 50).requires_grad_(), draw(widths[1], 50, seed=1)
    result = transport_distance(student, teacher, cost=cost, plan=plan)

    def omega(y: Tensor) -> Tensor:
        y, z = (side - side.mean(1, keepdim=True) for side in (y, result.rotation @ teacher))
        if cost == "correlation":
            y, z = (side / side.norm(dim=1, keepdim=True) for side in (y, z))
        return 1 - (y / y.norm() * z / z.norm()).sum()

    torch.testing.assert_close(result.value, omega(student), rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(value, student)[0] for value in (result.value, omega(student))]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)
    direction = draw(*student.shape, seed=2)
    with torch.no_grad():
        slope = (omega(student + 1e-6 * direction) - omega(student - 1e-6 * direction)) / 2e-6
    assert float((gradients[0] * direction).sum()) == pytest.approx(float(slope), rel=1e-6, abs=1e-9)


def test_procrustes_distance_of_scipy() -> None:
    student, teacher = draw(9, 50), draw(6, 50, seed=1)
    result = transport_distance(student, teacher, cost="covariance", plan="orthogonal")
    sides = [side - side.mean(1, keepdim=True) for side in (torch.cat([teacher, torch.zeros(3, 50)]), student)]
    _, total = orthogonal_procrustes(*((side / side.norm()).numpy().T for side in sides))
    assert result.value.item() == pytest.approx(1 - total, abs=1e-12)
    assert result.singular_values.shape == (6,)
    assert result.singular_values.sum().item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies(dtype: torch.dtype) -> None:
    teacher = draw(12, 80)
    rotated = torch.linalg.qr(draw(12, 12, seed=3))[0] @ teacher
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    permuted = torch.linspace(0.1, 5, 12, dtype=torch.float64)[:, None] * teacher[order]
    for student, cost, other in ((rotated, "covariance", "correlation"), (permuted, "correlation", "covariance")):
        sides = student.to(dtype), teacher.to(dtype)
        assert transport_distance(*sides, cost=cost, plan="orthogonal").value.abs() <= 1e-6
        assert transport_distance(*sides, cost=other, plan="orthogonal").value > 1e-3
        assert transport_distance(*sides, cost=cost, plan="random_orthogonal").value > 0.5


def test_what_a_result_has() -> None:
    student, teacher = draw(6, 50), draw(9, 50, seed=1)
    result = transport_distance(student, teacher, plan="orthogonal")
    np.testing.assert_allclose(
        result.cost.numpy(), 1 - np.corrcoef(student.numpy(), teacher.numpy())[:6, 6:], atol=1e-12
    )
    for number in (result.entropy, result.marginal_error, result.student_marginal_error, result.off_identity):
        assert number.isnan()
    values = result.singular_values
    assert torch.equal(values, values.sort(descending=True).values)
    assert 0 < values.sum() <= 1
    assert transport_distance(student, teacher).singular_values is None


@pytest.mark.parametrize("plan", PLANS)
def test_batch_is_the_loop(plan: str) -> None:
    student, teacher = draw(3, 6, 50).requires_grad_(), draw(3, 9, 50, seed=1)
    result = transport_distance(student, teacher, plan=plan, seed=4)
    result.value.sum().backward()
    for index in range(3):
        single = student[index].detach().requires_grad_()
        expected = transport_distance(single, teacher[index], plan=plan, seed=4)
        expected.value.backward()
        torch.testing.assert_close(result.value[index], expected.value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(result.rotation[index], expected.rotation, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(result.singular_values[index], expected.singular_values, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(student.grad[index], single.grad, rtol=1e-8, atol=1e-10)


def test_controls_follow_their_seed() -> None:
    student, teacher = draw(6, 50), draw(9, 50, seed=1)
    values = [
        float(transport_distance(student, teacher, plan="random_orthogonal", seed=seed).value) for seed in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]
    assert float(transport_distance(student, teacher, plan="orthogonal").value) < min(values)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"plan": "orthogonal", "cost": "euclidean"}, "plan='orthogonal' cannot be combined with cost='euclidean'"),
    ({"plan": "random_orthogonal", "cost": "sqeuclidean"}, "with cost='sqeuclidean'.*standardises"),
    ({"cost": "covariance"}, 'cost="covariance" cannot be combined with plan=\'sinkhorn\'.*plan="orthogonal"'),
    ({"cost": "covariance", "plan": "random"}, "cannot be combined with plan='random'"),
]


@pytest.mark.parametrize(("options", "message"), [*REFUSED, ({"plan": "orthogonal", "cost": torch.cdist}, "'cdist'")])
def test_plans_and_costs_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transport_distance(draw(6, 50), draw(9, 50), **options)
    with pytest.raises(ValueError, match=message):
        RepresentationTransfer(torch.nn.Linear(2, 2), **options)
    if isinstance(options["cost"], str):
        with pytest.raises(ValueError, match=message):
            NeuronTransportDistance(6, 9, **options)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("plan", PLANS)
def test_metric_is_the_distance_of_all_observations(widths: tuple[int, int], cost: str, plan: str) -> None:
    student, teacher = draw(widths[0], 90), draw(widths[1], 90, seed=1)
    student[1], teacher[2] = 3.0, 0.0  # dead neurons
    metric = NeuronTransportDistance(*widths, cost=cost, plan=plan, seed=2).set_dtype(torch.float64)
    for part in zip(student.split([50, 10, 30], 1), teacher.split([50, 10, 30], 1), strict=True):
        metric.update(*part)
    expected = transport_distance(student, teacher, cost=cost, plan=plan, seed=2)
    torch.testing.assert_close(metric.compute(), expected.value, rtol=1e-8, atol=1e-10)
    found = metric.transport()
    for name in ("matrix", "cost", "singular_values"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-8)
    for again in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert torch.equal(again.set_dtype(torch.float32).compute(), metric.compute().float())
    metric.reset()
    metric.update(student[:, :2], teacher[:, :2])
    with pytest.warns(UserWarning, match="2 observations"):
        assert metric.compute().isnan()


def test_a_rotation_is_no_plan() -> None:
    student, teacher = draw(6, 50), draw(9, 50, seed=1)
    coupled, planned = transport_distance(student, teacher, plan="orthogonal"), transport_distance(student, teacher)
    assert torch.equal(coupled.rotation, coupled.matrix)
    assert torch.equal(planned.plan, planned.matrix)
    assert (hasattr(coupled, "plan"), hasattr(planned, "rotation")) == (False, False)
    with pytest.raises(AttributeError, match="no transport plan: use `rotation`"):
        _ = coupled.plan
