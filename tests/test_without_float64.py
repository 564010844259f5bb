"""Apple GPUs (MPS) have no float64. A fake GPU stands for one here: whatever makes a float64 tensor on it raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engines import COSTS, TERMS, make
from old_versions import needs_fake_cuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_otrt import NeuronTransportDistance
from lightning_otrt.teacher.frozen.identity import stem_checksum
from lightning_otrt.transport.correlation import CorrelationCost
from lightning_otrt.transport.cost import Plan
from lightning_otrt.transport.plans import exact_plan
from lightning_otrt.transport.tensors import FLOAT64_OBSERVATIONS


class NoFloat64(TorchDispatchMode):
    """Raises where a float64 tensor is made on the fake GPU, or moved to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda" and tensor.dtype == torch.float64:
                raise TypeError(f"This GPU has no float64, which {func} makes.")
        return found


@contextmanager
def apple_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True), NoFloat64():
        patch.setattr("lightning_otrt.transport.tensors.WITHOUT_FLOAT64", ("cuda",))
        yield


def draw(rows: int, observations: int = 40) -> Tensor:
    return torch.randn(rows, observations, device="cuda")


@needs_fake_cuda
def test_float64_raises() -> None:
    with apple_gpu(), pytest.raises(TypeError, match="no float64"):
        draw(2).double()


@needs_fake_cuda
@pytest.mark.parametrize("cost", TERMS)
@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize("observations", [40, FLOAT64_OBSERVATIONS + 1])
def test_training(cost: str, memory: float, observations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    coupling = "lightning_otrt.steps.entropic_coupling.EntropicCoupling"
    monkeypatch.setattr(f"{coupling}._finished", lambda self, *given: given[-1])  # it reads the error of a first plan
    engine = make(cost, pairs=1, memory=memory)
    engine.calls = 1  # the first call reads values, which fake tensors do not have
    with apple_gpu():
        for _ in range(3):
            term, _ = engine.term([[(draw(7, observations).requires_grad_(), draw(9, observations))]], observations)
            assert (term.device.type, term.dtype) == ("cuda", torch.float32)


@needs_fake_cuda
def test_values_that_are_exchanged() -> None:
    with apple_gpu():
        y, x = draw(7), draw(9)
        rounds = CorrelationCost().shared_value(y, x, Plan.of(torch.full((7, 9), 1 / 63, device="cuda")), None)
        sums = rounds.send(next(rounds))
        with pytest.raises(StopIteration) as stop:
            rounds.send(sums)
        value, gradient = stop.value.value
        assert (value.dtype, gradient.dtype) == (torch.float32, torch.float32)


@needs_fake_cuda
@pytest.mark.parametrize("cost", COSTS)
def test_the_metric_stays_on_the_cpu(cost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_otrt.analysis.metric.check_finite", lambda *args: None)
    monkeypatch.setattr("lightning_otrt.transport.moments.all_nonzero", lambda values: False)
    metric = NeuronTransportDistance(7, 9, cost=cost)
    with apple_gpu():
        metric = metric.to("cuda")
        metric.update(draw(7), draw(9))
        metric.update(draw(7), draw(9))
        assert (metric.sums.device.type, metric.sums.dtype) == ("cpu", torch.float64)
        metric.reset()
        metric.update(draw(7), draw(9))
        assert metric.sums.device.type == "cpu"


@needs_fake_cuda
def test_what_is_read_on_the_host() -> None:
    """It leaves the device first. Fake tensors have no values, which is what the errors are about."""
    with apple_gpu():
        with pytest.raises(RuntimeError, match="numpy"):
            exact_plan(torch.rand(2, 5, 5, device="cuda"))
        with torch.device("cuda"):
            teacher = nn.Linear(3, 4)
        with pytest.raises(RuntimeError, match="numpy"):
            stem_checksum(teacher)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize("cost", TERMS)
def test_the_documented_tolerance(cost: str, memory: float, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over so many observations are taken in float32 where there is no float64 (docs/options.md)."""
    values = []
    for lacking in ((), ("cpu",)):
        monkeypatch.setattr("lightning_otrt.transport.tensors.WITHOUT_FLOAT64", lacking)
        torch.manual_seed(0)
        x = torch.randn(8, FLOAT64_OBSERVATIONS + 1) + offset
        y = 0.7 * x[:6] + 0.5 * torch.randn(6, FLOAT64_OBSERVATIONS + 1)
        engine = make(cost, pairs=1, memory=memory)
        for _ in range(3):
            term, _ = engine.term([[(y, x)]], 1000)
        values.append(float(term))
    assert values[1] == pytest.approx(values[0], rel=1e-5)
