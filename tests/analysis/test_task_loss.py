"""The loss of the task without a Trainer: by a function of the batch, of outputs and targets, or by training_step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Task, loader, make_task
from torch import nn
from torch.nn import functional as F

from lightning_otrt.analysis.task_loss import find_task_loss


@pytest.fixture
def batch() -> list[torch.Tensor]:
    return next(iter(loader()))


def test_ways_to_give_the_loss(batch: Any) -> None:
    task = make_task().double()
    batch = [batch[0].double(), batch[1]]
    expected = F.cross_entropy(task.net(batch[0]), batch[1])
    for loss_of in (
        find_task_loss(task, None, None),
        find_task_loss(task, task.loss, None),
        find_task_loss(task.net, None, F.cross_entropy),
        find_task_loss(task, lambda batch: {"loss": task.loss(batch)[None], "other": 1}, None),
    ):
        loss = loss_of(batch)
        assert loss.shape == ()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert loss.requires_grad


def test_a_training_step_that_logs(batch: Any) -> None:
    class Logs(Task):
        def training_step(self, batch: Any) -> Any:
            loss = self.loss(batch)
            self.log("loss", loss)
            self.log_dict({"a": loss})
            return {"loss": loss}

    task = Logs()
    assert find_task_loss(task, None, None)(batch) > 0
    assert not {"log", "log_dict"} & vars(task).keys()


def test_a_training_step_that_needs_a_trainer(batch: Any) -> None:
    class NeedsTrainer(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch) * self.trainer.max_epochs

    task = NeedsTrainer()
    loss_of = find_task_loss(task, None, None)
    with pytest.raises(TypeError, match=r"needs a Trainer.*Pass `task_loss`"):
        loss_of(batch)
    assert not {"log", "log_dict"} & vars(task).keys()


def test_errors_of_the_step_are_its_own(batch: Any) -> None:
    class Broken(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match=r"^size mismatch$"):
        find_task_loss(Broken(), None, None)(batch)


def test_manual_optimization() -> None:
    task = make_task()
    task.automatic_optimization = False
    with pytest.raises(TypeError, match="manual optimization: its training_step needs a Trainer"):
        find_task_loss(task, None, None)


def test_nothing_to_compute_it_from() -> None:
    with pytest.raises(TypeError, match="^Linear has no `training_step`, so its loss is not known: pass `loss_fn`"):
        find_task_loss(nn.Linear(2, 2), None, None)
    with pytest.raises(TypeError, match="Expected one of `task_loss` and `loss_fn`, but got both"):
        find_task_loss(nn.Linear(2, 2), F.cross_entropy, F.cross_entropy)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (1.0, "float"),
        (None, "NoneType"),
        ({"objective": 1}, "NoneType"),
        (torch.ones(3, requires_grad=True), r"a tensor of shape \(3,\)"),
        (torch.ones(()), r"a tensor of shape \(\) without gradient \(is the student frozen\?\)"),
    ],
)
def test_what_is_no_loss(returned: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"Expected `task_loss` to return a scalar loss with gradient, but got {got}"):
        find_task_loss(nn.Linear(2, 2), lambda batch: returned, None)(None)


@pytest.mark.parametrize("batch", [torch.zeros(4, 1, 8, 8), (1, 2, 3), {"x": 1}])
def test_batches_that_are_no_pairs(batch: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected batches \(x, y\) for `loss_fn`, but got .* Pass `task_loss`"):
        find_task_loss(nn.Linear(2, 2), None, F.cross_entropy)(batch)
