"""Steps in which the term would be missing without a word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    Net,
    Task,
    assert_same,
    hooks,
    loader,
    make_task,
    make_trainer,
    weights,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F
from trainer.fits import fitted, make_callback


class Silent(Task):
    """Manual steps in which something keeps the term away."""

    how = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if self.how == "forward":
            F.cross_entropy(self.net.head(self.net.forward(batch[0]) @ torch.ones(3, 8)), batch[1]).backward()
        elif self.how == "frozen":
            self.net.requires_grad_(False)
            self.net(batch[0])
            self.net.requires_grad_(True)
            self.manual_backward(self.net.head.weight.sum())
        else:
            self.loss(batch).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("bare", r"ended without `self\.manual_backward\(loss\)`"),
        ("forward", r"in 4 training steps no `self\.manual_backward\(loss\)` came after a forward"),
        ("frozen", r"in 4 training steps no `self\.manual_backward\(loss\)` came after a forward"),
    ],
)
def test_a_manual_step_without_term_is_an_error(how, words):
    task = make_task(Silent)
    task.how = how
    with pytest.raises(MisconfigurationException, match=words):
        fitted([make_callback()], task=task)
    assert not hooks(task)


class Elsewhere(Task):
    """Never calls the module that holds the layers."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(Net.forward(self.net, batch[0]), batch[1])


def test_a_root_that_is_not_called_is_an_error():
    task = make_task(Elsewhere)
    with pytest.raises(RuntimeError, match="student_root"):
        fitted([make_callback()], task=task)
    assert not hooks(task)


def test_a_frozen_student_is_an_error():
    task = make_task()
    task.net.block1.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"constant.*net\.block1"):
        fitted([make_callback(layers={"net.block1": "block1"})], task=task)


def test_not_strict_leaves_the_term_out_with_one_warning():
    task = make_task(Elsewhere)
    with pytest.warns(UserWarning, match="strict=False") as caught:
        fitted([make_callback(strict=False)], task=task)
    assert sum("strict=False" in str(warning.message) for warning in caught) == 1
    assert_same(weights(task), weights(fitted([], task=make_task(Elsewhere))))


class WithNone:
    """Batches of which the first is None: Lightning leaves its step out."""

    def __iter__(self) -> Iterator[Any]:
        yield None
        yield from loader()

    def __len__(self) -> int:
        return 1 + len(loader())


def test_a_batch_that_is_none_is_no_missing_term():
    callback, trainer = make_callback(), make_trainer(max_epochs=1)
    trainer.callbacks.append(callback)
    with pytest.warns(UserWarning, match="train_dataloader yielded None"):
        trainer.fit(make_task(), WithNone())
    assert callback.transfer.engine.calls == len(loader())
