"""Networks whose forward takes a gradient itself, such as forces from an energy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer


class Forces(nn.Module):
    def __init__(self, width: int, *, enables: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.head, self.enables = nn.Linear(width, 1), enables

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(self.enables or torch.is_grad_enabled()):
            positions = positions.detach().requires_grad_()
            energy = self.head(self.body(positions))
            (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=self.training)
        return energy, -gradient


def term(student: nn.Module, teacher: nn.Module) -> Tensor:
    transfer = RepresentationTransfer(teacher, {"body.1": "body.1"}, plan="exact", memory=0)
    with transfer.attached(student):
        student(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
        return transfer.loss()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_error_says_what_to_do(side: str) -> None:
    student, teacher = (Forces(width, enables=side != name) for name, width in (("student", 4), ("teacher", 4)))
    with pytest.raises(RuntimeError, match=r"^The forward of Forces takes.*enable_grad.*student_root"):
        term(student, teacher)


def test_enabled_in_the_forward() -> None:
    """A copy whose neurons are in another order has the distance 0."""
    teacher = Forces(4, enables=True)
    student = Forces(4, enables=True)
    order = torch.tensor([2, 0, 3, 1])
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        for mine, its in zip(student.body[0].parameters(), teacher.body[0].parameters(), strict=True):
            mine.copy_(its[order])
    value = term(student, teacher)
    assert value.requires_grad
    assert float(value.detach()) < 1e-5
    assert float(term(Forces(4, enables=True), teacher).detach()) > 0.1
