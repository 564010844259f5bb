"""A momentum encoder as the teacher, held as the error of a registered one says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LAYERS, Task, assert_same, loader, make_task, make_trainer, weights
from torch import Tensor, nn

from lightning_otrt import OTRTCallback


class Momentum(Task):
    """Holds the encoder in a list, and follows the network with it after each step."""

    def set_up(self) -> nn.Module:
        encoder = copy.deepcopy(self.net).requires_grad_(False)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        self.momentum = [encoder]
        return encoder

    def on_fit_start(self) -> None:
        self.momentum[0].to(self.device)

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        for own, followed in zip(self.momentum[0].parameters(), self.net.parameters(), strict=True):
            own.lerp_(followed, 0.2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["momentum"] = self.momentum[0].state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.momentum[0].load_state_dict(checkpoint["momentum"])


def make() -> tuple[Momentum, OTRTCallback]:
    task = make_task(kind=Momentum)
    return task, OTRTCallback(task.set_up(), LAYERS, student_root="net")


def state(task: Momentum) -> dict[str, Tensor]:
    return {**weights(task), **{f"momentum.{key}": value for key, value in weights(task.momentum[0]).items()}}


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole, callback = make()
    start = state(whole)
    trainer = make_trainer(callbacks=[callback], max_epochs=2)
    trainer.fit(whole, loader())
    assert float(trainer.callback_metrics["train/otrt"]) > 1e-3
    assert all(module.training for module in whole.momentum[0].modules())
    first, callback = make()
    trainer = make_trainer(callbacks=[callback], max_epochs=1)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, callback = make()
    make_trainer(callbacks=[callback], max_epochs=2).fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert_same(state(second), state(whole))
    followed = [name for name, _ in whole.momentum[0].named_parameters()]
    assert not any(torch.equal(state(whole)[f"momentum.{name}"], start[f"momentum.{name}"]) for name in followed)


def test_a_registered_one_is_refused() -> None:
    task, callback = make()
    task.encoder = task.momentum[0]
    with pytest.raises(ValueError, match=r"^The teacher is the submodule 'encoder' of the student \(Momentum\)\. It"):
        make_trainer(callbacks=[callback]).fit(task, loader())
