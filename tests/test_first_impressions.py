"""What newcomers ran into."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

from lightning_otrt import OTRTCallback, RepresentationTransfer


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


class _Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = _net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.mark.parametrize(("student", "prefix"), [(_Task, "net."), (_net, "")])
def test_indices_count_alike_inside_a_lightning_module(student, prefix) -> None:
    transfer = RepresentationTransfer(_net(), [-1, -2, 0])
    module = student()
    with transfer.attached(module):
        module(torch.randn(8, 6))
        transfer.loss()
    assert [(p.student, p.teacher) for p in transfer.pairs] == [(f"{prefix}{n}", n) for n in ("4", "3", "0")]


def test_callbacks_that_differ_in_one_option_go_together() -> None:
    teacher = _net()
    options = [{}, {"layers": "penultimate"}, {"cost": torch.cdist}, {"cost": _squared}, {"plan": "orthogonal"}]
    callbacks = [OTRTCallback(teacher, **option) for option in options]
    trainer = L.Trainer(callbacks=list(callbacks), logger=False, enable_checkpointing=False, accelerator="cpu")
    assert {callback.state_key for callback in callbacks} <= {callback.state_key for callback in trainer.callbacks}
    assert len({callback.state_key for callback in callbacks}) == len(options)


def _squared(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return torch.cdist(student, teacher) ** 2
