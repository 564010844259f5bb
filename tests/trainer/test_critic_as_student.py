"""A critic that learns from a teacher: its term is no part of the generator's loss."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import make_trainer
from torch import Tensor, nn

from lightning_otrt import OTRTCallback, RepresentationTransfer

REAL = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


def critic(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


class Players(pl.LightningModule):
    """As in the documentation of Lightning: each optimizer is toggled in its own half of the step."""

    def __init__(self, first: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.automatic_optimization, self.first = False, first
        self.generator, self.critic = nn.Linear(3, 6), critic(5)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        generating, criticising = self.optimizers()
        halves = [(generating, self.generator_loss), (criticising, self.critic_loss)]
        for optimizer, loss in halves if self.first == "generator" else halves[::-1]:
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def generator_loss(self, real: Tensor) -> Tensor:
        return -self.critic(self.generator(NOISE)).mean()

    def critic_loss(self, real: Tensor) -> Tensor:
        return self.critic(self.generator(NOISE).detach()).mean() - self.critic(real).mean()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(player.parameters(), 0.1) for player in (self.generator, self.critic)]


def fitted(first: str, *callbacks: pl.Callback) -> dict[str, Any]:
    task = Players(first)
    loader = torch.utils.data.DataLoader(REAL, 8)
    make_trainer(max_epochs=1, callbacks=list(callbacks)).fit(task, loader)
    return {name: value.clone() for name, value in task.state_dict().items()}


@pytest.mark.parametrize("first", ["generator", "critic"])
@pytest.mark.parametrize("root", ["critic", None])
def test_the_generator_does_not_see_the_term(first: str, root: str | None) -> None:
    torch.manual_seed(3)
    callback = OTRTCallback(critic(7), {"critic.3": "3"}, weight=4.0, student_root=root)
    plain, found = fitted(first), fitted(first, callback)
    changed = {name.partition(".")[0] for name, value in found.items() if not torch.equal(value, plain[name])}
    # The generator of the second half sees a critic that the term has trained.
    assert changed == ({"critic"} if first == "generator" else {"critic", "generator"})


@pytest.mark.parametrize("frozen", ["in this step", "from the start", "not at all"])
def test_a_frozen_student_behind_what_is_trained(frozen: str) -> None:
    """A frozen network may train prompts before it. Only one that was frozen after the start is of another's step."""
    torch.manual_seed(3)
    student, prompts = critic(5), torch.zeros(6, requires_grad=True)
    transfer = RepresentationTransfer(critic(7), {"net.3": "3"}, student_root="net")
    student.requires_grad_(frozen != "from the start")
    with transfer.attached(nn.ModuleDict({"net": student})):
        student.requires_grad_(frozen == "not at all")
        student(REAL + prompts)
        if frozen == "in this step":
            with pytest.raises(RuntimeError, match="No parameter of the student .* requires a gradient"):
                transfer.loss()
            student.requires_grad_(True)
            student(REAL)
        transfer.loss().backward()
    assert (prompts.grad is None) == (frozen == "in this step")
