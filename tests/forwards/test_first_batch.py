"""The first batch, on which both networks are traced, gives the term of the batch itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer, transport_distance


class Normalising(nn.Module):
    """Standardises its inputs, in place or not, and then has a hidden layer.

    Args:
        width: Hidden neurons.
        in_place: Whether it writes to its inputs.
    """

    def __init__(self, width: int, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        # Correlations of a linear layer alone would not see that its inputs were normalised twice.
        self.hidden = nn.Sequential(nn.Linear(6, width), nn.Tanh())
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(2).div_(3) if self.in_place else (x - 2) / 3
        return self.head(self.hidden(x))


@pytest.mark.parametrize(("student_writes", "teacher_writes"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("cost", ["correlation", "euclidean"])
def test_networks_that_write_to_their_inputs(student_writes: bool, teacher_writes: bool, cost: str) -> None:
    """Each network normalises what the batch holds, once, in the first step and in later ones."""
    torch.manual_seed(0)
    student, teacher = Normalising(5, in_place=student_writes), Normalising(7, in_place=teacher_writes)
    x = 3 * torch.randn(40, 6) + 2
    found: list[Tensor] = []
    transfer = RepresentationTransfer(teacher, ["hidden"], plan="exact", cost=cost, memory=0)
    with transfer.attached(student):
        for _ in range(3):
            with pytest.warns(UserWarning, match="in place") if not found else torch.enable_grad():
                student(x.clone())
            found.append(transfer.loss().detach() / transfer.weight)
    y, z = (net.hidden((x - 2) / 3).detach().T for net in (student, teacher))
    expected = transport_distance(y, z, plan="exact", cost=cost).value
    torch.testing.assert_close(torch.stack(found), expected.expand(3), rtol=1e-4, atol=1e-5)
