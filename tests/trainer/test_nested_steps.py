"""A training step that calls `self.training_step` for the parts of its batch: one step, with one term for each loss."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import LAYERS, Task, assert_same, differ, loader, make_task, make_teacher, make_trainer, weights
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from lightning_otrt import OTRTCallback, OTRTModule


class Parts(Task):
    """Whose batch is a dictionary of batches."""

    def whole(self, batch: dict[str, Any]) -> Any:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.whole(batch) if isinstance(batch, dict) else self.part(batch)

    def part(self, batch: list[Tensor]) -> Any:
        return self.loss(batch)


class OneNested(Parts):
    def whole(self, batch: dict[str, Any]) -> Tensor:
        return self.training_step(batch["a"], 0) + self.loss(batch["b"])


class AllNested(Parts):
    def whole(self, batch: dict[str, Any]) -> Tensor:
        return sum(self.training_step(part, 0) for part in batch.values())


class Flat(Parts):
    def whole(self, batch: dict[str, Any]) -> Tensor:
        return sum(self.loss(part) for part in batch.values())


class Manual(Parts):
    def part(self, batch: list[Tensor]) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class ManualNested(Manual):
    def whole(self, batch: dict[str, Any]) -> None:
        for part in batch.values():
            self.training_step(part, 0)


class ManualFlat(Manual):
    def whole(self, batch: dict[str, Any]) -> None:
        for part in batch.values():
            self.part(part)


def both() -> CombinedLoader:
    """Eight batches, whose parts have other sizes."""
    return CombinedLoader({"a": loader(), "b": loader(32, 4)}, "min_size")


def fitted(kind: type[Task], callbacks: list[OTRTCallback], *, is_wrapped: bool = False) -> dict[str, Tensor]:
    task = make_task(kind)
    task.automatic_optimization = not issubclass(kind, Manual)
    module = OTRTModule(task, make_teacher(), LAYERS, solve_every=1) if is_wrapped else task
    make_trainer(max_epochs=2, callbacks=callbacks).fit(module, both())
    return weights(task)


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"schedule": lambda step: 1.0 + step % 3}])
@pytest.mark.parametrize(
    ("nested", "flat", "calls"), [(OneNested, Flat, 16), (AllNested, Flat, 16), (ManualNested, ManualFlat, 32)]
)
def test_it_trains_as_a_step_that_calls_none(nested, flat, calls, options):
    found = []
    for kind in (nested, flat):
        callback = OTRTCallback(make_teacher(), LAYERS, solve_every=1, **options)
        found.append(fitted(kind, [callback]))
        assert callback.transfer.run_state.calls == calls
    assert_same(*found)
    assert differ(found[0], fitted(nested, []))


@pytest.mark.parametrize(("nested", "flat"), [(OneNested, Flat), (ManualNested, ManualFlat)])
def test_with_two_callbacks_and_in_a_wrapper(nested, flat):
    def two() -> list[OTRTCallback]:
        return [OTRTCallback(make_teacher(), {name: layer}, solve_every=1) for name, layer in LAYERS.items()]

    assert_same(fitted(nested, two()), fitted(flat, two()))
    assert_same(fitted(nested, [], is_wrapped=True), fitted(flat, [], is_wrapped=True))


def test_an_error_in_a_part_leaves_the_next_fit_alone():
    class Once(OneNested):
        fails = True

        def part(self, batch: list[Tensor]) -> Tensor:
            loss = self.loss(batch)
            if self.fails:
                raise ValueError("a part fails")
            return loss

    task, callback = make_task(Once), OTRTCallback(make_teacher(), LAYERS)
    with pytest.raises(ValueError, match="a part fails"):
        make_trainer(max_epochs=1, callbacks=[callback]).fit(task, both())
    Once.fails = False
    make_trainer(max_epochs=1, callbacks=[callback]).fit(task, both())
    assert callback.transfer.run_state.calls == 8
