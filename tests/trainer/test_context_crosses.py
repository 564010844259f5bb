"""Contexts crossed: each value of a factor with each value of every other."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    Task,
    assert_agree,
    forwards,
    hooks,
    make_data,
    make_teacher,
    needs_averaging,
    weights,
)
from lightning.pytorch.callbacks import LearningRateFinder
from torch import Tensor, nn
from trainer.contexts import (
    EXACT,
    IN_BF16,
    IN_FLOAT32,
    IN_FP16,
    CheckpointedNet,
    Context,
    HandMade,
    Inside,
    by_name,
    scaled_mixed_precision,
)

from lightning_otrt import OTRTCallback, OTRTModule


class Crossed(Task):
    """Any way to step with any of the networks."""

    def __init__(self, how: str = "automatic", every: int = 1, checkpointed: bool = False) -> None:
        super().__init__(norm=not checkpointed)
        self.how, self.every = how, every
        self.automatic_optimization = how != "manual"
        if checkpointed:
            self.net = CheckpointedNet(norm=False)
            self.net.block2 = Inside(self.net.block2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if self.how != "manual":
            loss = self.add(self.loss(batch))
            return {"loss": loss} if self.how == "dictionary" else loss
        self.manual_backward(self.add(self.loss(batch) / self.every))
        if (batch_idx + 1) % self.every == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return None


class Failing(pl.Callback):
    """Ends a fit with an exception."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        raise ZeroDivisionError


class Copying(pl.Callback):
    """Copies the module in the middle of a fit in three ways, and trains the copies, which does nothing to the fit."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        file = io.BytesIO()
        trainer_of, pl_module._trainer = pl_module._trainer, None
        try:
            torch.save(pl_module, file)
            copies = copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))
        finally:
            pl_module._trainer = trainer_of
        file.seek(0)
        with forwards(self.teacher) as count:
            for copied in (*copies, torch.load(file, weights_only=False)):
                copied.net(make_data(4).tensors[0].to(next(copied.parameters()).dtype)).sum().backward()
        assert not count


def averaging() -> pl.Callback:
    return pl.callbacks.WeightAveraging(avg_fn=lambda average, value, count: 0.9 * average + 0.1 * value)


FACTORS: dict[str, list[Any]] = {
    "precision": ["32-true", "bf16-mixed", "bf16-true", "64-true", "16-mixed"],
    "how": ["automatic", "dictionary", "manual"],
    "every": [1, 4],
    "compiled": [False, True],
    "checkpointed": [False, True],
    "beside": ["nothing", "averaging", "finder", "copies", "exception", "fit before"],
    "way": ["callback", "wrapper"],
}


def pairwise() -> list[dict[str, Any]]:
    """Rows in which each two values of two factors meet: greedily, so that the first rows have most of them."""
    names = list(FACTORS)
    rows = list(itertools.product(*FACTORS.values()))
    met: set[Any] = set()

    def pairs(row: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(zip(names, row, strict=True), 2))

    # Lightning's finder does not vary the learning rate of manual steps.
    possible = {row: pairs(row) for row in rows if (row[1], row[5]) != ("manual", "finder")}
    wanted = set().union(*possible.values())
    found = []
    while met < wanted:
        best = max(possible, key=lambda row: len(possible[row] - met))
        found.append(dict(zip(names, best, strict=True)))
        met |= possible.pop(best)
    return found


CROSSES = [
    pytest.param(row, id="-".join(map(str, row.values())), marks=[] if index < 5 else [pytest.mark.slow])
    for index, row in enumerate(pairwise())
]


@needs_averaging
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
# The scaler skips the first step of the finder.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("row", CROSSES)
def test_crosses_of_contexts(row: dict[str, Any], tmp_path: Path) -> None:
    automatic, beside = row["how"] != "manual", row["beside"]

    def trainer() -> dict[str, Any]:
        options: dict[str, Any] = {"default_root_dir": tmp_path, "max_steps": 2, "precision": row["precision"]}
        if row["precision"] == "16-mixed":
            options = {**options, **scaled_mixed_precision(), "max_steps": 4}
            del options["precision"]
        return {**options, "accumulate_grad_batches": row["every"] if automatic else 1}

    def callbacks() -> list[pl.Callback]:
        made = {"averaging": averaging, "finder": lambda: LearningRateFinder(num_training_steps=6)}
        return [made[beside]()] if beside in made else []

    context = Context(Crossed, trainer, {name: row[name] for name in ("how", "every", "checkpointed")})

    def fit(term: bool) -> dict[str, Tensor]:
        task = context.make()
        if term:
            task.term = HandMade(task, make_teacher())
        context.fit(task, callbacks=callbacks())
        return weights(task)

    task, teacher = context.make(), make_teacher()
    start = weights(task)
    if row["compiled"]:
        task.net = torch.compile(task.net, backend="eager")
    by_callback = row["way"] == "callback"
    added = [OTRTCallback(teacher, **EXACT)] if by_callback else []
    model = task if by_callback else OTRTModule(task, teacher, **EXACT)
    if beside == "exception":
        with pytest.raises(ZeroDivisionError):
            context.fit(model, callbacks=[*added, Failing()])
        assert not hooks(task, teacher)
    if beside == "fit before":
        context.fit(model, callbacks=added)
        assert not hooks(task, teacher)
    task.load_state_dict(dict(zip(task.state_dict(), start.values(), strict=True)))
    context.fit(model, callbacks=[*added, *callbacks(), *([Copying(teacher)] if beside == "copies" else [])])
    assert not hooks(task, teacher)
    tolerance = {"32-true": IN_FLOAT32, "64-true": 1e-6, "16-mixed": IN_FP16}.get(row["precision"], IN_BF16)
    assert_agree(by_name(weights(task)), fit(term=True), fit(term=False), tolerance)
