"""A copy of the teacher in another type computes what the teacher computes now."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import seeded
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

X = seeded(0, torch.randn, 8, 4)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.head, self.scale = nn.Linear(4, width), nn.Linear(width, 3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.scale * self.body(x)))


CHANGES: dict[str, Callable[[Net], object]] = {
    "an attribute": lambda net: setattr(net, "scale", 3.0),
    "a hook": lambda net: net.body.register_forward_hook(lambda module, args, output: output * 3),
    "a layer of equal shape": lambda net: setattr(net, "body", nn.Sequential(nn.Linear(4, 8), nn.ReLU())),
    "weights": lambda net: net.body.weight.data.mul_(3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_reaches_the_copy(name: str) -> None:
    """As where the teacher runs in its own type."""
    found: list[list[float]] = []
    for dtype in (None, torch.float64):
        teacher, student = seeded(1, Net, 8), seeded(2, Net, 6)
        transfer = RepresentationTransfer(teacher, ["head:input"], distillation=1.0, teacher_dtype=dtype)
        values = []
        with transfer.attached(student):
            for step in range(3):
                if step == 1:
                    with torch.random.fork_rng():
                        torch.manual_seed(5)
                        CHANGES[name](teacher)
                student(X)
                transfer.loss()
                values.append(float(transfer.distillation_value))
        found.append(values)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][0] != pytest.approx(found[0][1], rel=1e-2)
