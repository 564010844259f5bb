"""In training a plan has few updates, and the student moves between them: how far the term is from the least cost."""

from __future__ import annotations

import ot
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt import RepresentationTransfer, neurons, transport_distance


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, width, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)),
    )


def least_cost(y: Tensor, x: Tensor) -> float:
    """By POT's exact solver, from maps."""
    y, x = (neurons(z.detach(), neuron_axis=1).double() for z in (y, x))
    y, x = (F.normalize(z - z.mean(1, keepdim=True), dim=1) for z in (y, x))
    masses = (torch.full((len(z),), 1 / len(z), dtype=torch.float64) for z in (y, x))
    return float(ot.emd2(*masses, 1 - y @ x.T))


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, 0.3, momentum=0.9), lambda p: torch.optim.Adam(p)])
@pytest.mark.parametrize(
    ("widths", "below", "masses"),
    [
        *(((6, 8), 0.08, 0.03), ((12, 8), 0.08, 0.03), ((16, 24), 0.05, 0.03), ((48, 64), 0.05, 0.03)),
        # Larger than what gets more updates.
        *(((64, 96), 0.15, 0.2), ((128, 192), 0.10, 0.2)),
    ],
)
def test_the_term_is_not_far_below_the_least_cost(widths, below, masses, optimizer):
    torch.manual_seed(2)
    teacher, student = network(widths[1]), network(widths[0])
    images, labels = F.avg_pool2d(torch.randn(64, 3, 8, 8), 3, 1, 1) * 3, torch.randint(5, (64,))
    transfer = RepresentationTransfer(teacher, [("3", "3")], weight=4.0, memory=0)
    optimizer = optimizer(student.parameters())
    shares, errors = [], []
    with transfer.attached(student):
        for step in range(120):
            chosen = torch.arange(16) + step % 4 * 16
            x = images[chosen]
            with torch.no_grad(), transfer.paused():
                maps = student[:4](x), teacher[:4](x)
            loss = F.cross_entropy(student(x), labels[chosen]) + transfer.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step > 15 and step % 10 in (0, 1):  # just after and just before a solve
                [distance] = transfer.distances
                shares.append(float(distance.value) / least_cost(*maps) - 1)
                errors.append(float((distance.plan.sum(0) - 1 / widths[1]).abs().sum()))
    assert min(shares) > -below
    assert sum(errors) / len(errors) < masses


def few_inputs(inputs: int, width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh() if inputs > 1 else nn.Identity(), nn.Linear(width, 3))


@pytest.mark.parametrize("plan", ["sinkhorn", "static"])
@pytest.mark.parametrize("width", [8, 64, 256])
@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_neurons_that_depend_on_few_inputs(inputs: int, width: int, plan: str) -> None:
    """Such plans need up to a thousand updates. The first solve takes them; before, the first cost could be 0."""
    student, teacher = few_inputs(inputs, width, 1), few_inputs(inputs, width, 2)
    torch.manual_seed(0)
    x = torch.randn(512, inputs)
    expected = transport_distance(student[0](x).T.detach(), teacher[0](x).T).value
    transfer = RepresentationTransfer(teacher, {"0": "0"}, plan=plan)
    with transfer.attached(student):
        for step in range(12):
            student(x)
            transfer.loss()
            [distance] = transfer.distances
            assert float(distance.value.detach()) == pytest.approx(float(expected), rel=0.06, abs=4e-3), step
