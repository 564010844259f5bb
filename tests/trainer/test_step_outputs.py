"""What a training step may return: each forward ends in a term, a discard or an error."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import Task, assert_same, loader, make_task, make_trainer, weights
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel, RandomDataset
from lightning.pytorch.demos.transformer import LightningTransformer, Transformer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from trainer.fits import fitted, make_callback
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from lightning_otrt import OTRTCallback, OTRTMonitor
from lightning_otrt.trainer.training_step import ExtraTerm, add_term, remove_term


class Frozen(Mapping[str, Any]):
    """A mapping that cannot be changed."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Uncopied(UserDict[str, Any]):
    def __copy__(self) -> Any:
        raise NotImplementedError


class Returning(Task):
    """Puts its loss into something, and notes what a step of ours returned and what was kept of it."""

    make: Callable[[Tensor], Any]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.given = self.make(self.loss(batch))
        return self.given


class Watching(pl.Callback):
    def __init__(self, callback: OTRTCallback) -> None:
        self.callback, self.kept, self.outputs = callback, [], []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.kept.append(len(self.callback.transfer.views))
        self.outputs.append(outputs)


def returning(make: Callable[[Tensor], Any]) -> Returning:
    task = make_task(Returning)
    task.make = make
    return task


MAPPINGS: dict[str, tuple[Callable[[Tensor], Any], type]] = {
    "dict": (lambda loss: {"loss": loss, "more": 1}, dict),
    "UserDict": (lambda loss: UserDict(loss=loss, more=1), UserDict),
    "MappingProxyType": (lambda loss: MappingProxyType({"loss": loss, "more": 1}), dict),
    "OrderedDict": (lambda loss: OrderedDict(loss=loss, more=1), OrderedDict),
    "defaultdict": (lambda loss: defaultdict(list, {"loss": loss, "more": 1}), defaultdict),
    "a frozen mapping": (lambda loss: Frozen(loss=loss, more=1), dict),
    "one that cannot be copied": (lambda loss: Uncopied(loss=loss, more=1), dict),
    "an output of Hugging Face": (
        lambda loss: SequenceClassifierOutput(loss=loss, logits=loss),
        SequenceClassifierOutput,
    ),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_mapping_gets_the_term(name: str) -> None:
    callback = make_callback()
    task, watching = returning(MAPPINGS[name][0]), Watching(callback)
    fitted([callback, watching], task=task)
    assert_same(weights(task), weights(fitted([make_callback()])))
    assert watching.kept == [0] * 4
    assert callback.transfer.engine.calls == 4
    given, loss = task.given, watching.outputs[-1]["loss"]
    # What the user made is not changed.
    term = 2.0 * sum(distance.value for distance in callback.transfer.distances) / 2
    torch.testing.assert_close(loss, given["loss"].detach() + term)
    assert [key for key in watching.outputs[-1] if key != "loss"] == [key for key in given if key != "loss"]


class One(ExtraTerm):
    def term(self, position: int) -> Tensor | None:
        return torch.tensor(1.0)


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_mapping_keeps_its_type(name: str) -> None:
    make, kind = MAPPINGS[name]
    task, term = returning(make), One()
    add_term(task, term)
    found = task.training_step([torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)], 0)
    remove_term(task, term)
    assert type(found) is kind
    assert set(found) == set(task.given)
    torch.testing.assert_close(found["loss"], task.given["loss"] + 1.0)


OTHERS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a tuple": (lambda loss: (loss, 1), "returned a tuple, to which no transfer term can be added"),
    "a list": (lambda loss: [loss], "returned a list, to which"),
    "a number": (lambda loss: loss.item(), "returned a float, to which"),
    "a number in a mapping": (lambda loss: {"loss": loss.item()}, "returned a dict whose 'loss' is a float, to which"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_an_error_and_nothing_is_kept(name: str) -> None:
    make, words = OTHERS[name]
    callback = make_callback()
    with pytest.raises(MisconfigurationException, match=rf"training_step of Returning {words}.*manual_backward"):
        fitted([callback], task=returning(make))
    assert not callback.transfer.views


def test_a_step_that_fails_keeps_nothing() -> None:
    """As where a loop goes on after running out of memory."""
    callback = make_callback()

    def fail(loss: Tensor) -> Tensor:
        assert len(callback.transfer.views) == 1
        raise KeyError("out")

    task, views = returning(fail), []
    with pytest.raises(KeyError):
        fitted([callback, Released(callback, views)], task=task)
    assert views == [0]


class Released(pl.Callback):
    """Looks before our callback releases everything: callbacks go in order."""

    def __init__(self, callback: OTRTCallback, views: list[int]) -> None:
        self.callback, self.views = callback, views

    def on_exception(self, *args: Any) -> None:
        self.views.append(len(self.callback.transfer.views))


class NoneSometimes(Task):
    """Skips all steps whose number is in a set."""

    skipped: frozenset[int] = frozenset()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        return None if batch_idx in self.skipped else loss


@pytest.mark.parametrize(("skipped", "calls"), [((), 4), ((0, 2), 2), ((0, 1, 2, 3), 0)])
def test_steps_that_are_skipped_on_purpose_are_no_error(skipped: tuple[int, ...], calls: int) -> None:
    task, callback = make_task(NoneSometimes), make_callback()
    task.skipped = frozenset(skipped)
    watching = Watching(callback)
    fitted([callback, watching], task=task, max_epochs=1, max_steps=-1, limit_train_batches=4)
    engine = callback.transfer.engine
    assert (engine.calls if engine else 0) == calls
    assert watching.kept == [0] * 4


@pytest.mark.parametrize(
    ("callback", "options"),
    [
        ({"weight": 0.0}, {}),
        ({"schedule": lambda step: 0.0}, {"fast_dev_run": 2}),
        ({}, {"limit_train_batches": 0}),
        ({}, {"fast_dev_run": True}),
    ],
)
def test_epochs_without_steps_of_a_term_are_no_error(callback: dict[str, Any], options: dict[str, Any]) -> None:
    fitted([make_callback(**callback)], **options)


def test_validation_alone_is_no_error() -> None:
    make_trainer(callbacks=[make_callback()]).validate(BoringModel(), DataLoader(RandomDataset(32, 8)), verbose=False)


class Silent(pl.Callback):
    """Takes the forwards away before the loss does, as a loop that goes round `training_step` would."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.training_step.with_terms = lambda loss, what: loss


def test_an_epoch_without_any_term_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match=r"In 8 training steps of Task the transfer term was never"):
        fitted([make_callback(), Silent()], max_epochs=1, max_steps=-1)
    fitted([make_callback(strict=False), Silent()], max_epochs=1, max_steps=-1)


class Sentences(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(5, 40, (6,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(index % 2)}


def bert(width: int) -> nn.Module:
    config = BertConfig(
        vocab_size=40, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    return BertForSequenceClassification(config)


class Text(pl.LightningModule):
    """Returns what a network of Hugging Face returns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = bert(8)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self.net(**batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_network_of_hugging_face_whose_output_is_returned() -> None:
    callback = OTRTCallback(bert(12), "blocks")
    watching = Watching(callback)
    trainer = make_trainer(callbacks=[callback, watching], max_steps=2)
    trainer.fit(Text(), DataLoader(Sentences(), batch_size=8))
    assert callback.transfer.engine.calls == 2
    assert watching.kept == [0, 0]
    assert trainer.callback_metrics["train/otrt"] > 0
    assert set(watching.outputs[0]) == {"loss", "logits"}


class Words(LightningTransformer):
    """Lightning's demo, whose step returns a mapping that cannot be changed; without the text that it would load."""

    prepare_data = pl.LightningModule.prepare_data

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return MappingProxyType({"loss": super().training_step(batch, batch_idx)})


class Tokens(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = torch.arange(11).add(index).remainder(20)
        return tokens[:-1], tokens[1:]


def test_the_transformer_of_lightnings_demos() -> None:
    student, teacher = Words(vocab_size=20), Transformer(vocab_size=20, nhid=40)
    callback = OTRTCallback(
        teacher, {"model.transformer.encoder.layers.1": "transformer.encoder.layers.1"}, student_root="model"
    )
    trainer = make_trainer(callbacks=[callback], max_steps=2)
    trainer.fit(student, DataLoader(Tokens(), batch_size=4))
    assert trainer.callback_metrics["train/otrt"] > 0


def test_the_manual_demo_of_lightning() -> None:
    callback = OTRTCallback(nn.Linear(32, 4), {"layer": ""})
    watching = Watching(callback)
    trainer = make_trainer(callbacks=[callback, watching], max_steps=2, limit_val_batches=0)
    trainer.fit(ManualOptimBoringModel(), DataLoader(RandomDataset(32, 16), batch_size=8))
    assert callback.transfer.engine.calls == 2
    assert watching.kept == [0, 0]


class ManuallyReturning(Returning):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(self.make(self.loss(batch)))
        self.optimizers().step()


WITHOUT_GRADIENT: dict[str, tuple[type[Returning], Callable[[Tensor], Any]]] = {
    "detached": (Returning, Tensor.detach),
    "detached in a mapping": (Returning, lambda loss: {"loss": loss.detach()}),
    "through a number": (Returning, lambda loss: torch.tensor(loss.item())),
    "manual": (ManuallyReturning, Tensor.detach),
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_a_loss_without_gradient_is_an_error_as_without_the_term(name: str) -> None:
    kind, make = WITHOUT_GRADIENT[name]
    for callbacks, kinds, words in (
        ([], RuntimeError, "does not require grad"),
        ([make_callback()], MisconfigurationException, "has no gradient, so that the transfer term alone"),
    ):
        task = make_task(kind)
        task.make = make
        with pytest.raises(kinds, match=words):
            fitted(callbacks, task=task)


def test_training_on_the_term_alone() -> None:
    task = returning(lambda loss: torch.zeros((), requires_grad=True))
    before, head = weights(task), task.net.head.weight.clone()
    fitted([make_callback()], task=task)
    assert torch.equal(task.net.head.weight, head)
    assert any(not torch.equal(value, before[name]) for name, value in weights(task).items())


class Reused(Task):
    """Whose validation takes the loss of the training step, as many do."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if not self.automatic_optimization and self.trainer.training:
            self.manual_backward(loss)
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        with torch.enable_grad():  # as for forces, which are derivatives
            found = self.training_step(batch, batch_idx)
        assert torch.equal(found, self.loss(batch))
        self.log("val_loss", found)


@pytest.mark.parametrize("has_monitor", [False, True])
@pytest.mark.parametrize("is_automatic", [True, False])
@pytest.mark.parametrize("schedule", [None, lambda step: float(step > 2)])
def test_a_validation_that_calls_the_training_step(schedule, is_automatic, has_monitor):
    """It gets the loss of the task alone, and the fit is that without a validation."""
    found = []
    for batches in (0, 2):
        task = make_task(Reused)
        task.automatic_optimization = is_automatic
        callback = make_callback(schedule=schedule)
        trainer = make_trainer(
            max_epochs=2,
            callbacks=[callback, *([OTRTMonitor()] if has_monitor else [])],
            inference_mode=False,
            limit_val_batches=batches,
        )
        trainer.fit(task, loader(), loader())
        found.append(weights(task))
        assert callback.transfer.run_state.calls == (16 if schedule is None else 13)
    assert_same(*found)
