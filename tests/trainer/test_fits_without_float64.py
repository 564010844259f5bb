"""Whole fits, and `suggest_weight`, where the device has no float64, as Apple's (MPS) has none."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import LAYERS, loader, make_task, make_teacher
from old_versions import needs_cuda_build, needs_fake_cuda
from test_without_float64 import NoFloat64
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trainer.fake_gpu import BATCH, Task, fake_cache, fake_fit, fake_gpu, network

from lightning_otrt import LogitDistillation, OTRTCallback, OTRTMonitor, suggest_weight


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fake GPU that raises where a float64 tensor is made on it."""
    monkeypatch.setattr("lightning_otrt.transport.tensors.WITHOUT_FLOAT64", ("cuda",))
    with fake_gpu(), NoFloat64():
        yield


@needs_cuda_build
@needs_fake_cuda
class TestFits:
    @pytest.mark.parametrize(
        "options",
        [
            {"distillation": 1.0},
            {"distillation": LogitDistillation(features="4:input")},
            {"plan": "orthogonal", "memory": 0.9},
            {"cost": "euclidean", "memory": 0.9},
        ],
        ids=repr,
    )
    def test_callback(self, options: dict[str, Any], apple: None) -> None:
        fake_fit(Task(), [OTRTCallback(network(12), **options)])

    def test_teacher_cache(self, apple: None) -> None:
        with fake_cache([0, 0, BATCH, 5, BATCH - 1]) as events:
            fake_fit(Task(), [OTRTCallback(network(12), teacher_cache="memory", distillation=1.0)])
        assert "hash" in events

    def test_monitor(self, apple: None) -> None:
        """Its validation distances are those of the metric, which stays on the CPU; see test_without_float64.py."""
        fake_fit(Task(), [OTRTCallback(network(12)), OTRTMonitor(every_n_steps=50, gradients=False)])

    def test_float64_in_a_step_is_found(self, apple: None) -> None:
        class Doubles(Task):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return super().training_step(batch, batch_idx).double()

        with pytest.raises(TypeError, match="no float64"):
            fake_fit(Doubles(), [OTRTCallback(network(12))])


class Float64(TorchDispatchMode):
    """Notes in which function of the package each float64 tensor is made."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = found if isinstance(found, (tuple, list)) else [found]
        if any(isinstance(tensor, Tensor) and tensor.dtype == torch.float64 for tensor in tensors):
            own = [frame for frame in traceback.extract_stack() if "lightning_otrt" in frame.filename]
            self.functions.add(own[-1].name)
        return found


@pytest.mark.parametrize("options", [{}, {"plan": "orthogonal", "distillation": 1.0}], ids=repr)
def test_suggest_weight(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes gradients, for which fake tensors need a driver; so the CPU stands for the device here."""
    monkeypatch.setattr("lightning_otrt.transport.tensors.WITHOUT_FLOAT64", ("cpu",))
    with Float64() as made:
        suggest_weight(make_task(), OTRTCallback(make_teacher(), LAYERS, **options), loader())
    assert made.functions <= {"_checksum", "_suggestion"}, "these two work on what was copied to the host"
