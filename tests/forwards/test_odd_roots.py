"""Roots that return nothing, and roots whose weights are not made yet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer, neurons, transport_distance


class Encoder(nn.Module):
    """Keeps its maps in an attribute, and returns nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1)
        self.fails = False

    def forward(self, x: Tensor) -> None:
        self.skips = [self.stem(x)]
        if self.fails:
            raise RuntimeError("fails on purpose")
        self.skips.append(self.block(self.skips[0]))


def test_a_root_that_returns_nothing():
    student, teacher, x = Encoder(4), Encoder(6), torch.randn(4, 3, 16, 16)
    transfer = RepresentationTransfer(teacher, {"block": "block"}, plan="exact")
    with transfer.attached(student):
        student.fails = True
        with pytest.raises(RuntimeError, match="on purpose"):
            student(x)
        student.fails = False
        with torch.no_grad():
            student(x)
        student(x)
        transfer.loss()
        assert transfer.samples == 4
    both = [neurons(net.block(net.stem(x)), neuron_axis=1) for net in (student, teacher)]
    torch.testing.assert_close(transfer.transport_value, transport_distance(*both, plan="exact").value)


def test_lazy_weights():
    student = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))
    teacher = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))
    x = torch.randn(4, 3, 8, 8)
    transfer = RepresentationTransfer(teacher, {"0": "0"}, plan="exact")
    told = r"lazy parameters that no forward has initialised: '0.weight', '0.bias', "
    told += r"'1.weight', '1.bias', '3.weight' and 3 more. Run it once"
    with transfer.attached(student), pytest.raises(ValueError, match=told):
        student(x)
    with torch.no_grad():
        student(x)
    with transfer.attached(student):
        student(x)
        transfer.loss()
    both = [neurons(net[0](x), neuron_axis=1) for net in (student, teacher)]
    torch.testing.assert_close(transfer.transport_value, transport_distance(*both, plan="exact").value)
