"""Copies of a student that is being recorded: plain modules, which neither record nor keep the teacher."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_otrt import RepresentationTransfer
from lightning_otrt.layers.pairs import LayerSpec
from lightning_otrt.reading.torch_internals import forward_hook_tables

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(module: nn.Module) -> nn.Module:
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))


class Task(nn.Module):
    """It holds what trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.transfer = net(8), RepresentationTransfer(net(12), {"net.1": "1"})

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


WAYS = [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved, averaged]


def hooks_of(module: nn.Module) -> int:
    return sum(len(table) for part in module.modules() for table in forward_hook_tables(part))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", ["before the first", "after a forward", "after a step"])
@pytest.mark.parametrize("layers", [{"1": "1"}, "penultimate"])
def test_they_are_plain(way: Callable[[nn.Module], nn.Module], when: str, layers: LayerSpec) -> None:
    student, teacher = net(8), net(12)
    transfer, known = RepresentationTransfer(teacher, layers), weakref.ref(teacher)
    with transfer.attached(student):
        if when != "before the first":
            student(X)
        if when == "after a step":
            transfer.loss()
        views = len(transfer.views)
        copied = way(student)
        torch.testing.assert_close(copied(X), student(X))
        assert len(transfer.views) == views + 1, "the student is recorded, the copy is not"
        assert hooks_of(copied) == 0
        assert hooks_of(student) > 0
        copied(X).sum().backward()
        transfer.loss()
    del transfer, teacher
    gc.collect()
    assert known() is None, "the copy keeps the teacher"
    if isinstance(copied, AveragedModel):
        copied.update_parameters(student)


@pytest.mark.parametrize("way", WAYS)
def test_of_a_module_that_holds_the_transfer(way: Callable[[nn.Module], nn.Module]) -> None:
    task = Task()
    with task.transfer.attached(task):
        task(X)
        copied = way(task)
        copied(X)
        assert hooks_of(copied) == 0
        assert len(task.transfer.views) == 1
        other = copied.module.transfer if isinstance(copied, AveragedModel) else copied.transfer
        assert not other.has_views
        task.transfer.loss()
