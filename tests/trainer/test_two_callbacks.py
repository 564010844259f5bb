"""Two callbacks in one fit: their terms add up, and neither disturbs the other."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    LAYERS,
    Net,
    differ,
    hooks,
    loader,
    make_task,
    make_teacher,
    make_trainer,
    weights,
)
from torch import nn
from trainer.fits import Seen, fitted, make_callback

from lightning_otrt import OTRTCallback, OTRTModule, TransferCallback


@pytest.mark.parametrize("layers", ["auto", LAYERS])
def test_two_callbacks_share_one_teacher(layers):
    """Each records its own run of the teacher, and its own forward of the student, also while the other traces."""
    teacher = make_teacher()
    first = make_callback(teacher, layers=layers, weight=1.0, cost="euclidean")
    second = make_callback(teacher, layers=layers, weight=1.0, cost="euclidean", student_root="net")
    both = fitted([first, second])
    expected = weights(fitted([make_callback(layers=layers, cost="euclidean", weight=2.0)]))
    for name, value in weights(both).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert not hooks(both, teacher)


def test_a_callback_beside_a_wrapped_module_with_the_same_term():
    teacher = make_teacher()
    module, callback = OTRTModule(make_task(), teacher, LAYERS), OTRTCallback(teacher, LAYERS)
    with pytest.warns(UserWarning, match=r"Two transfers of this Trainer have the same teacher \(.*\), layers, plan"):
        make_trainer(callbacks=[callback]).fit(module, loader())


def test_two_callbacks_add_up_and_log_under_names_of_their_own():
    first = make_callback(layers={"net.block1": "block1"}, weight=2.0)
    second = make_callback(layers={"net.block2": "block2"}, weight=1.0)
    seen = Seen()
    both = fitted([first, second, seen])
    assert set(seen.values[-1]) == {
        "train/otrt",
        "train/otrt-2",
        "otrt/weight",
        "otrt/weight-2",
        "otrt/distance/net.block1",
        "otrt/distance/net.block2-2",
    }
    assert seen.bar == ["train/otrt", "train/otrt-2"]
    one = OTRTCallback(
        make_teacher(),
        layers=[
            {"student": "net.block1", "teacher": "block1", "weight": 2.0},
            {"student": "net.block2", "teacher": "block2", "weight": 1.0},
        ],
        weight=3.0,
    )
    expected = weights(fitted([one]))
    for name, value in weights(both).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_a_callback_whose_root_lies_inside_that_of_another():
    """It traces its layers while the forward of the other is being recorded."""
    inner = torch.nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU())
    options = {"layers": {"net.block2": "1"}, "student_root": "net.block2", "weight": 1.0}
    first, second, seen = make_callback(), OTRTCallback(inner, **options), Seen()
    both = fitted([first, second, seen])
    alone = Seen()
    one = fitted([make_callback(), alone])
    assert seen.values[0]["train/otrt"] == alone.values[0]["train/otrt"]
    assert seen.values[0]["train/otrt-2"] > 0
    assert differ(weights(both), weights(one))


class TwoPlayers(pl.LightningModule):
    """Two networks, each with an optimizer and a backward pass of its own, one after the other in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Net(), Net(6)
        self.automatic_optimization = False

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(player.parameters(), lr=0.1) for player in (self.first, self.second)]

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        for optimizer, player in zip(self.optimizers(), (self.first, self.second), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(player(batch[0]), batch[1]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def test_each_player_has_a_callback():
    """The term of the one that has not run yet, or whose backward pass is over, is no part of that of the other."""
    callbacks = [
        OTRTCallback(make_teacher(), {f"{name}.block1": "block1"}, student_root=name, weight=1.0)
        for name in ("first", "second")
    ]
    trainer = make_trainer(callbacks=callbacks, max_steps=6)  # three batches: each optimizer counts
    trainer.fit(TwoPlayers(), loader())
    assert [callback.transfer.engine.calls for callback in callbacks] == [3, 3]
    assert {"train/otrt", "train/otrt-2"} <= set(trainer.callback_metrics)


def test_teachers_of_one_architecture_on_the_same_layers():
    """Their states are told apart, in any order, and two callbacks alike are refused by Lightning."""
    teachers = [make_teacher(), make_teacher()]
    with torch.no_grad():
        teachers[1].block1[0].weight.add_(1)
    keys = {make_callback(teacher).state_key for teacher in teachers}
    assert len(keys) == 2
    assert keys == {make_callback(teacher).state_key for teacher in (teachers[1], make_teacher())}
    task = fitted([make_callback(teacher) for teacher in teachers])
    assert differ(weights(task), weights(fitted([make_callback()])))
    other_head = make_teacher()
    nn.init.zeros_(other_head.head.weight)
    for twin in (make_teacher(), other_head):  # the head, which comes after the layers, is in no key
        with pytest.raises(RuntimeError, match="more than one stateful callback"):
            fitted([make_callback(), make_callback(twin, weight=1.0)])


def test_isinstance_finds_the_callback_of_a_wrapped_module_too():
    """They are two classes: of callbacks of one class Lightning keeps that of the module alone."""
    wrapped = OTRTModule(make_task(), make_teacher(), layers=LAYERS, weight=1.0)
    trainer = make_trainer(callbacks=[make_callback(layers={"net.block1": "block1"})])
    trainer.fit(wrapped, loader())
    found = [each.transfer for each in trainer.callbacks if isinstance(each, TransferCallback)]
    assert found == [trainer.callbacks[0].transfer, wrapped.otrt]
