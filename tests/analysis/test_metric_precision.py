"""Types and devices: statistics stay in float64 and move with the metric, whatever the inputs and the value are in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from analysis.metric_problem import COSTS, M, N, batches, double, exact_distance, neurons

from lightning_otrt.analysis.metric import NeuronTransportDistance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cost", COSTS)
def test_half_precision(cost: str, dtype: torch.dtype) -> None:
    """Metric and inputs in half precision, which MetricTester runs through forward and compute."""
    student, teacher = (tensor.to(dtype) for tensor in neurons(80))
    metric = NeuronTransportDistance(N, M, cost=cost, plan="exact")
    metric.set_dtype(dtype)
    value = metric(student, teacher)
    assert value.dtype == metric.compute().dtype == dtype
    assert value.item() == pytest.approx(exact_distance(student, teacher, cost), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cost", COSTS)
def test_inputs_of_other_precision(cost: str, dtype: torch.dtype) -> None:
    metric = double(cost=cost, plan="exact")
    student, teacher = (tensor.to(dtype) for tensor in neurons(80))
    for index in torch.arange(80).split(33):
        metric.update(student[:, index], teacher[:, index])
    assert metric.compute().item() == pytest.approx(exact_distance(student, teacher, cost), abs=1e-8)


def test_under_autocast_and_inference_mode() -> None:
    student, teacher = neurons(80)
    plain, inside = double(), double()
    plain.update(student, teacher)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside.update(student, teacher)
        value = inside.compute()
    torch.testing.assert_close(value, plain.compute(), rtol=0, atol=1e-12)
    inside.reset()
    inside.update(student, teacher)
    torch.testing.assert_close(inside.compute(), plain.compute(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "convert",
    [
        lambda metric: metric.half(),
        lambda metric: metric.float(),
        lambda metric: metric.set_dtype(torch.float16),
        lambda metric: metric.to(torch.bfloat16),
        lambda metric: torch.nn.ModuleDict({"metric": metric}).to(torch.float16),
        lambda metric: torch.nn.ModuleDict({"metric": metric}).half(),
    ],
)
def test_statistics_stay_in_float64(convert: Callable[[NeuronTransportDistance], object]) -> None:
    first, second = batches((40, 40))
    metric = NeuronTransportDistance(N, M, plan="exact")
    metric.update(*first)
    metric.transport()
    convert(metric)
    assert metric.sums.dtype == torch.float64
    assert metric.transport().plan.dtype == torch.float64
    metric.update(*second)
    value = metric.compute()
    assert value.dtype == metric.dtype
    torch.testing.assert_close(
        metric.transport().value.item(), exact_distance(*neurons(80), "correlation"), rtol=0, atol=1e-8
    )
    metric.reset()
    assert metric.sums.dtype == torch.float64


def test_moves_with_its_plan() -> None:
    metric = NeuronTransportDistance(N, M)
    metric.update(*neurons(40))
    metric.transport()
    metric.to("meta")
    assert metric.sums.device.type == "meta"
    assert metric.transport().plan.device.type == metric.compute().device.type == "meta"
    metric.reset()
    assert metric.sums.device.type == "meta"


def test_plans_in_float32_have_the_value_of_those_in_float64() -> None:
    student, teacher = neurons(400)
    values = []
    for metric in (double(), NeuronTransportDistance(N, M)):
        metric.update(student, teacher)
        values.append(metric.compute().double())
        assert metric.transport().plan.dtype == torch.float64
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=0)


def test_value_is_float32_by_default() -> None:
    metric = NeuronTransportDistance(N, M)
    metric.update(*neurons(40))
    assert metric.compute().dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    student, teacher = (tensor.cuda() for tensor in neurons(80))
    metric = double(plan="exact")
    with pytest.raises(RuntimeError, match="different devices in metric calculation"):
        metric.update(student, teacher)
    metric = double(plan="exact").to("cuda")
    with torch.autocast("cuda", torch.float16):
        metric.update(student, teacher)
    assert metric.compute().device.type == metric.transport().plan.device.type == "cuda"
    assert metric.compute().item() == pytest.approx(exact_distance(student.cpu(), teacher.cpu(), "correlation"))
    metric.cpu()
    assert metric.transport().plan.device.type == "cpu"
