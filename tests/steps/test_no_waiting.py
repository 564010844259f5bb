"""On a device nothing between the first call and the next read of the flags waits for it.

Fake tensors run the forward on a GPU that is not there. They hold no values, so every read of one raises.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import TERMS, call, draw, make
from old_versions import needs_cuda_build, needs_fake_cuda
from operations import operations
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lightning_otrt.steps.engine import TransportEngine


def call_on_a_fake_gpu(engine: TransportEngine, calls: int = 4) -> None:
    # The first call checks its values, and waits.
    engine.calls = 1
    with FakeTensorMode():
        pairs = [tuple(torch.randn(size, 40, device="cuda") for size in widths) for widths in ((12, 12), (7, 11))]
        for y, _ in pairs:
            y.requires_grad_()
        for _ in range(calls):
            assert engine.term([pairs], 40)[0].device.type == "cuda"


@needs_cuda_build
@needs_fake_cuda
@pytest.mark.parametrize("cost", TERMS)
@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_nothing_waits_for_the_device(cost: str, memory: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third of the calls is one between two solves."""
    coupling = "lightning_otrt.steps.entropic_coupling.EntropicCoupling"
    # All of them are alike.
    monkeypatch.setattr(f"{coupling}.iterations", lambda *_: 3)
    # A first plan may wait.
    monkeypatch.setattr(f"{coupling}._finished", lambda self, *given: given[-1])
    call_on_a_fake_gpu(make(cost, pairs=2, memory=memory, solve_every=10))


@needs_cuda_build
@needs_fake_cuda
@pytest.mark.parametrize("plan", ["uniform", "random"])
def test_controls_do_not_wait(plan: str) -> None:
    call_on_a_fake_gpu(make("sqeuclidean", pairs=2, plan=plan))


@needs_cuda_build
@needs_fake_cuda
@pytest.mark.parametrize("options", [{"plan": "exact"}, {"plan": "static"}])
def test_plans_that_are_known_to_wait(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """They solve on the CPU, or have to count finite samples. So a test above would notice, too."""
    coupling = "lightning_otrt.steps.entropic_coupling.EntropicCoupling"
    monkeypatch.setattr(f"{coupling}._finished", lambda self, *given: given[-1])
    with pytest.raises((DataDependentOutputException, RuntimeError)):
        call_on_a_fake_gpu(make(pairs=2, **options))


@needs_cuda_build
@needs_fake_cuda
def test_a_first_plan_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the look whether it needs more updates; so the tests above leave it out, by name."""
    monkeypatch.setattr("lightning_otrt.steps.entropic_coupling.EntropicCoupling.iterations", lambda *_: 3)
    with pytest.raises(DataDependentOutputException):
        call_on_a_fake_gpu(make(pairs=2), calls=1)


@pytest.mark.parametrize("cost", TERMS)
def test_the_backward_pass_reads_nothing(cost: str) -> None:
    loss = call(make(cost), draw())
    assert operations(loss.backward).reads() == 0


@pytest.mark.parametrize("cost", TERMS)
@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize("dead", [0, 2])
def test_a_cpu_and_a_device_take_paths_to_the_same_numbers(
    cost: str, memory: float, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU is free to look at values, and leaves out what they make needless."""
    found = []
    for looks in (True, False):
        if not looks:
            for module in ("transport.correlation", "transport.moments", "transport.tensors", "steps.pair_state"):
                monkeypatch.setattr(f"lightning_otrt.{module}.all_nonzero", lambda values: False)
        engine = make(cost, memory=memory, solve_every=1)
        for step in range(4):
            y, x = draw(seed=step, dtype=torch.float64)
            with torch.no_grad():
                y[:dead], x[: dead + 1] = 3.0, -1.0
                if step == 2:
                    x[-1, 0] = torch.nan
            loss = call(engine, (y, x))
            loss.backward()
        found.append((loss.detach(), y.grad, engine.states[0].plan.matrix))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
