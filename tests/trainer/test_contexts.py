"""In every context of a fit the three ways in give the same weights to the last bit, and those of hand-written losses.

A loss by hand takes other operations, which round differently from processor to processor. It is compared in float64
wherever the context leaves the precision open, and else with a tolerance that is that of the number format.
"""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    LAYERS,
    Net,
    Task,
    ValidatedTask,
    assert_agree,
    assert_same,
    differ,
    forwards,
    hooks,
    loader,
    make_data,
    make_task,
    make_teacher,
    make_trainer,
    needs_averaging,
    weights,
)
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_otrt import LinearWarmup, OTRTCallback, OTRTModule, RepresentationTransfer, neurons, transport_distance

#: With these a plan is that of the batch alone, as `transport_distance` finds it.
EXACT: dict[str, Any] = {"layers": LAYERS, "weight": 2.0, "plan": "exact", "memory": 0, "solve_every": 1}


class HandMade:
    """The term as a user would write it with hooks of their own and the public function."""

    def __init__(self, task: Task, teacher: nn.Module) -> None:
        self.task, self.teacher = task, teacher.eval()
        self.seen: dict[tuple[str, str], Tensor] = {}
        self.x: Tensor | None = None
        self.names = {"student": list(LAYERS), "teacher": list(LAYERS.values())}
        if hasattr(task, "net"):
            self.hook()

    def hook(self) -> None:
        self.task.net.register_forward_pre_hook(lambda _, args: setattr(self, "x", args[0]))
        for side, model in (("student", self.task), ("teacher", self.teacher)):
            for name in self.names[side]:
                model.get_submodule(name).register_forward_hook(self.keep(side, name))

    def keep(self, side: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if (side == "teacher" or torch.is_grad_enabled()) and torch._C._current_graph_task_id() == -1:
                # What a reading saves must not enter the count that activation checkpointing keeps.
                with saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
                    self.seen[side, name] = neurons(output, neuron_axis=1)

        return hook

    def __call__(self) -> Tensor:
        self.teacher = self.teacher.to(next(self.task.parameters()).dtype)
        with torch.no_grad():
            self.teacher(self.x)
        seen, self.seen = self.seen, {}
        pairs = [(seen["student", s], seen["teacher", t]) for s, t in LAYERS.items()]
        return 2.0 * (sum(transport_distance(*pair, plan="exact").value for pair in pairs) / 2)

    def discard(self) -> None:
        self.seen = {}


class Manual(Task):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.add(self.loss(batch)))
        optimizer.step()


class Dictionary(Task):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Any]:
        loss = self.add(self.loss(batch))
        return {"loss": loss, "other": loss.detach()}


class Skipping(Task):
    """Every second step returns None after the student ran."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = self.add(self.loss(batch)) if batch_idx % 2 == 0 else self.loss(batch)
        if batch_idx % 2 == 0:
            return loss
        if self.term is not None:
            getattr(self.term, "__self__", self.term).discard()
        return None


class LookingAhead(Task):
    """A forward without gradient before the one that is trained on."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.net(batch[0] + 1)
        return self.add(self.loss(batch))


class CheckpointedNet(Net):
    """Recorded layers are recomputed in the backward pass: the first itself, the second from inside."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(checkpoint(self.block1, x, use_reentrant=False), 2)
        return self.head(self.block2(x).mean((2, 3)))


class Inside(nn.Module):
    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Checkpointed(Task):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = CheckpointedNet(norm=False)
        self.net.block2 = Inside(self.net.block2)


class CheckpointedWhole(Task):
    """The checkpointed function holds the recorded layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(norm=False, **options)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(checkpoint(self.net, batch[0], use_reentrant=False), batch[1])


class Late(Task):
    """The layers exist only after `configure_model`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            torch.manual_seed(5)
            self.net = Net(4)
            if isinstance(self.term, HandMade):
                self.term.hook()


@dataclass(frozen=True)
class Context:
    """A setting of a fit: the task and its options, and what makes the options of the trainer.

    With ``late`` the layers exist only during the fit, so that a hand-written loop cannot attach before it.
    """

    task: type[Task] = Task
    trainer: Callable[[], dict[str, Any]] = dict
    options: dict[str, Any] = field(default_factory=dict)
    late: bool = False
    #: Of the weights by hand, as a part of the effect of the term.
    tolerance: float = 1e-6

    def make(self) -> Task:
        return make_task(self.task, **self.options)

    def fit(self, model: Any, **extra: Any) -> None:
        torch.manual_seed(7)
        options = self.trainer()
        if "precision" not in options and "plugins" not in options:
            options["precision"] = "64-true"
        make_trainer(**options, **extra).fit(model, loader())


def scaled_mixed_precision() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)], "max_steps": 8}


#: Rounding after a few steps, as a part of the effect of the term.
IN_FLOAT32, IN_FP16, IN_BF16 = 1e-4, 1e-2, 5e-2

CONTEXTS = {
    "plain": Context(),
    "32-true": Context(trainer=lambda: {"precision": "32-true"}, tolerance=IN_FLOAT32),
    "accumulation": Context(trainer=lambda: {"accumulate_grad_batches": 4, "max_epochs": 2}),
    "clipping by norm": Context(trainer=lambda: {"gradient_clip_val": 0.1}),
    "clipping by value": Context(trainer=lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16-mixed": Context(trainer=lambda: {"precision": "bf16-mixed"}, tolerance=IN_BF16),
    "bf16-true": Context(trainer=lambda: {"precision": "bf16-true"}, tolerance=IN_BF16),
    "16-mixed with a scaler that skips": Context(trainer=scaled_mixed_precision, tolerance=IN_FP16),
    "manual": Context(Manual),
    "manual in bf16-mixed": Context(Manual, trainer=lambda: {"precision": "bf16-mixed"}, tolerance=IN_BF16),
    "dictionary": Context(Dictionary),
    "dictionary with accumulation": Context(
        Dictionary, trainer=lambda: {"accumulate_grad_batches": 4, "max_epochs": 2}
    ),
    "None": Context(Skipping, trainer=lambda: {"max_epochs": 2}),
    "a forward without gradient": Context(LookingAhead),
    "dropout": Context(options={"dropout": 0.5}),
    "activation checkpointing": Context(Checkpointed),
    "activation checkpointing of the root": Context(CheckpointedWhole),
    "deterministic": Context(trainer=lambda: {"deterministic": True}),
    "detecting anomalies": Context(trainer=lambda: {"detect_anomaly": True}),
    "without inference mode": Context(trainer=lambda: {"inference_mode": False}),
    "configure_model": Context(Late, late=True),
}


def by_callback(context: Context, *others: pl.Callback) -> dict[str, Tensor]:
    task, teacher = context.make(), make_teacher()
    context.fit(task, callbacks=[OTRTCallback(teacher, **EXACT), *others])
    assert not hooks(task, teacher)
    return weights(task)


def by_wrapper(context: Context) -> dict[str, Tensor]:
    task, teacher = context.make(), make_teacher()
    context.fit(OTRTModule(task, teacher, **EXACT))
    assert not hooks(task, teacher)
    return weights(task)


def by_transfer(context: Context) -> dict[str, Tensor]:
    task, transfer = context.make(), RepresentationTransfer(make_teacher(), **EXACT)
    task.term = transfer.loss
    with transfer.attached(task):
        context.fit(task)
    return weights(task)


def by_hand(context: Context) -> dict[str, Tensor]:
    task = context.make()
    task.term = HandMade(task, make_teacher())
    context.fit(task)
    return weights(task)


def without(context: Context) -> dict[str, Tensor]:
    task = context.make()
    context.fit(task)
    return weights(task)


@pytest.mark.parametrize("name", CONTEXTS)
def test_every_way_in_gives_the_same_weights(name):
    context = CONTEXTS[name]
    found = by_callback(context)
    assert_same(by_wrapper(context), found)
    if not context.late:
        assert_same(by_transfer(context), found)
    assert_agree(found, by_hand(context), without(context), context.tolerance)


# Crosses: each value of a factor with each value of every other


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


# Values that are not finite


def some_batches(*chosen: int) -> DataLoader[Any]:
    """Batches of the shared data, of which the second has infinite inputs."""
    x, y = make_data().tensors
    x[8:16] = float("inf")
    return DataLoader([[x[8 * i : 8 * i + 8], y[8 * i : 8 * i + 8]] for i in chosen], batch_size=None)


def fit_some(task: Task, batches: DataLoader[Any], **options: Any) -> RepresentationTransfer:
    callback = OTRTCallback(make_teacher(), **EXACT, teacher_inputs=lambda x: torch.nan_to_num(x, posinf=0.0))
    make_trainer(callbacks=[callback], max_epochs=1, **options).fit(task, batches)
    return callback.transfer


def test_steps_of_a_student_that_is_not_finite_are_skipped_by_the_scaler():
    """The term is not finite then, is told once, and leaves nothing behind in weights and plans."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    task = make_task(norm=False)
    with pytest.warns(UserWarning, match="NaN or infinite") as told:
        transfer = fit_some(
            task, some_batches(0, 1, 2, 1, 3), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        )
    assert sum("NaN or infinite" in str(warning.message) for warning in told) == 1
    assert scaler.get_scale() == 1.0
    assert all(state["plan"].isfinite().all() for state in transfer.state_dict()["engine"]["pairs"])
    without_them = make_task(norm=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    fit_some(without_them, some_batches(0, 2, 3), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    for name, value in weights(without_them).items():
        torch.testing.assert_close(weights(task)[name], value)


@pytest.mark.filterwarnings("ignore:Error detected in")
def test_anomalies_in_the_student_are_detected():
    task = make_task(norm=False)
    with (
        pytest.warns(UserWarning, match="NaN or infinite"),
        pytest.raises(RuntimeError, match="returned nan values in its"),
    ):
        fit_some(task, some_batches(0, 1), detect_anomaly=True)
    assert not hooks(task)


@pytest.mark.parametrize(
    ("name", "accumulate", "clip", "autocast", "dtype"),
    [
        ("plain", 1, None, False, torch.float64),
        ("32-true", 1, None, False, torch.float32),
        ("accumulation", 4, None, False, torch.float64),
        ("clipping by norm", 1, 0.1, False, torch.float64),
        ("bf16-mixed", 1, None, True, torch.float32),
    ],
)
def test_a_loop_without_lightning_gives_the_same_weights(name, accumulate, clip, autocast, dtype):
    context = CONTEXTS[name]
    task, transfer = make_task().to(dtype), RepresentationTransfer(make_teacher(), **EXACT)
    optimizer = task.configure_optimizers()
    batches = list(loader()) * 2 if accumulate > 1 else list(loader())[:4]
    with transfer.attached(task):
        for index, (x, y) in enumerate(batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(task(x.to(dtype)), y) + transfer.loss()
            (loss / accumulate).backward()
            if (index + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(task.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    if name == "bf16-mixed" and differ(train_plain_in_bf16(), without(context)):
        pytest.skip("with this version of torch, a loop and Lightning differ in bf16 without the term, too")
    assert_same(by_callback(context), weights(task))


def train_plain_in_bf16() -> dict[str, Tensor]:
    task = make_task()
    optimizer = task.configure_optimizers()
    for x, y in list(loader())[:4]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(task(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(task)


def reference(plan: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """⟨P, 1 - r⟩ by autograd, with P held."""
    y, x = (z - z.mean(1, keepdim=True) for z in (y, x))
    y, x = (z / z.norm(dim=1, keepdim=True) for z in (y, x))
    return (plan * (1 - y @ x.T)).sum()


class Views(Task):
    """Two views of each batch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.add(self.loss([x, y]) + self.loss([x.flip(3), y]))


class LBFGS(Task):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=3)


class HandMadeViews(HandMade):
    """One plan for both views, from their pooled observations, and kept over the closures of a batch."""

    def __init__(self, task: Task, teacher: nn.Module) -> None:
        super().__init__(task, teacher)
        self.views: list[tuple[Tensor, Tensor]] = []
        self.plan: Tensor | None = None
        self.batch: int | None = None

    def keep(self, side: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if side == "student" and torch.is_grad_enabled() and name == "net.block1":
                with torch.no_grad():
                    self.teacher(self.x)
                self.views.append((neurons(output, neuron_axis=1), self.seen.pop("teacher")))
            elif side == "teacher":
                self.seen["teacher"] = neurons(output, neuron_axis=1)

        return hook

    def hook(self) -> None:
        self.names = {"student": ["net.block1"], "teacher": ["block1"]}
        super().hook()

    def __call__(self) -> Tensor:
        views, self.views = self.views, []
        batch = self.task.trainer.fit_loop.batch_idx
        if batch != self.batch:
            pooled = [torch.cat([view[side].detach() for view in views], 1) for side in (0, 1)]
            self.plan, self.batch = transport_distance(*pooled, plan="exact").plan, batch
        return 2.0 * sum(reference(self.plan, *view) for view in views) / len(views)


@pytest.mark.parametrize("kind", [Views, LBFGS])
def test_one_plan_for_all_forwards_of_a_batch(kind):
    """Against autograd in float64: two views are averaged, and closures of LBFGS keep the plan."""

    def fit(hand: bool) -> tuple[dict[str, Tensor], Any]:
        task, teacher = make_task(kind).double(), make_teacher().double()
        options = {**EXACT, "layers": {"net.block1": "block1"}}
        callback = OTRTCallback(teacher, **options)
        if hand:
            task.term = HandMadeViews(task, teacher)
        make_trainer(precision="64-true", callbacks=[] if hand else [callback]).fit(task, loader())
        return weights(task), callback.transfer

    expected, _ = fit(hand=True)
    found, transfer = fit(hand=False)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
    # Two views of a step, and the closures of an LBFGS step, are one call.
    assert transfer.engine.calls == 4


def test_lbfgs_keeps_the_statistics_of_a_batch():
    """A running cost sees each batch once, however often LBFGS evaluates it."""
    seen = {}
    for kind in (LBFGS, Task):
        callback = OTRTCallback(make_teacher(), layers=LAYERS, memory=0.9)
        task = make_task(kind, lr=0.0)
        if kind is LBFGS:
            task.configure_optimizers = lambda task=task: torch.optim.LBFGS(task.parameters(), lr=0.0, max_iter=5)
        make_trainer(callbacks=[callback]).fit(task, loader())
        seen[kind] = callback.transfer.engine
    assert seen[LBFGS].calls == seen[Task].calls == 4
    counts = [[pair.sums[0].item() for pair in seen[kind].pairs] for kind in (LBFGS, Task)]
    assert counts[0] == counts[1]
    assert counts[0][0] == pytest.approx(8 * 4 * 4 * sum(0.9**age for age in range(4)))


class Adversarial(Task):
    """Inner steps of an attack with gradient, left out of the term."""

    transfer: ClassVar[list[RepresentationTransfer]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        attacked = x.clone().requires_grad_()
        with self.transfer[0].paused():
            (gradient,) = torch.autograd.grad(F.cross_entropy(self.net(attacked), y), attacked)
        return self.add(self.loss([x + 0.1 * gradient.sign(), y]))


def test_paused_forwards_are_left_out(monkeypatch):
    context = Context(Adversarial, options={"norm": False})
    results = []
    for way in ("callback", "wrapper", "transfer"):
        task, teacher = context.make(), make_teacher()
        callback = OTRTCallback(teacher, **EXACT)
        transfer = callback.transfer
        if way == "callback":
            monkeypatch.setattr(Adversarial, "transfer", [transfer])
            context.fit(task, callbacks=[callback])
        elif way == "wrapper":
            wrapped = OTRTModule(task, teacher, **EXACT)
            monkeypatch.setattr(Adversarial, "transfer", [wrapped.otrt])
            context.fit(wrapped)
        else:
            monkeypatch.setattr(Adversarial, "transfer", [transfer])
            task.term = transfer.loss
            with transfer.attached(task):
                context.fit(task)
        results.append(weights(task))
        monkeypatch.setattr(Adversarial, "transfer", [RepresentationTransfer(teacher)])
    plain = without(context)
    hand = context.make()
    hand.term = HandMade(hand, make_teacher())
    context.fit(hand)
    for found in results:
        assert_same(found, results[0])
    assert_agree(results[0], weights(hand), plain)


class TwoPlayers(Task):
    """As in adversarial training: both players are updated in turn, by the example of Lightning."""

    def __init__(self, toggle: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.critic = nn.Linear(3, 1)
        self.automatic_optimization = False
        self.toggle = toggle

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        self.play(first, lambda: self.add(-self.critic(self.net(batch[0])).mean()))
        self.play(second, lambda: self.critic(self.generate(batch[0])).mean())

    def generate(self, x: Tensor) -> Tensor:
        if self.toggle:
            return self.net(x).detach()
        with torch.no_grad():
            return self.net(x)

    def play(self, optimizer: Any, loss: Callable[[], Tensor]) -> None:
        if self.toggle:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss())
        optimizer.step()
        if self.toggle:
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.critic)]


class NothingLeft(pl.Callback):
    """No recorded forward outlives its step, also where no backward took it."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        (callback,) = [callback for callback in trainer.callbacks if isinstance(callback, OTRTCallback)]
        assert not callback.transfer.views


class CriticFirst(TwoPlayers):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        self.play(second, lambda: self.critic(self.generate(batch[0])).mean())
        if isinstance(self.term, HandMade):
            self.term.discard()
        self.play(first, lambda: self.add(-self.critic(self.net(batch[0])).mean()))


@pytest.mark.parametrize("kind", [TwoPlayers, CriticFirst])
@pytest.mark.parametrize("toggle", [True, False])
def test_a_manual_step_of_two_players(kind, toggle):
    """A forward of the student that is not trained on, its parameters frozen or without gradient, has no term."""
    context = Context(kind, trainer=lambda: {"max_epochs": 1}, options={"toggle": toggle})
    found = by_callback(context, NothingLeft())
    assert_same(by_wrapper(context), found)
    assert_agree(found, by_hand(context), without(context))


@pytest.mark.parametrize("from_inside", [False, True])
def test_reentrant_checkpointing_of_recorded_layers_is_an_error(from_inside):
    """The forward runs without gradient there, so that a term would be constant."""
    task = make_task(norm=False)
    block = task.net.block1
    if from_inside:
        task.net.block1 = Reentrant(block)
    else:
        task.net.forward = lambda x: task.net.head(checkpoint(block, x, use_reentrant=True).mean((2, 3)).repeat(1, 2))
    x, _ = next(iter(loader()))
    transfer = RepresentationTransfer(
        make_teacher(), layers={"net.block1.inner" if from_inside else "net.block1": "block1"}
    )
    with transfer.attached(task):
        task(x.requires_grad_())
        with pytest.raises(RuntimeError, match=r"net\.block1.*use_reentrant=False"):
            transfer.loss()


class Reentrant(nn.Module):
    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=True)


def whole(task: Any, **how: Any) -> Any:
    return torch.compile(task, **how)


def submodule(task: Any, **how: Any) -> Any:
    task.net = torch.compile(task.net, **how)
    return task


def submodule_in_place(task: Any, **how: Any) -> Any:
    task.net.compile(**how)
    return task


def layer(task: Any, **how: Any) -> Any:
    task.net.block1 = torch.compile(task.net.block1, **how)
    return task


def layer_in_place(task: Any, **how: Any) -> Any:
    task.net.block1.compile(**how)
    return task


def task_in_place(task: Any, **how: Any) -> Any:
    task.compile(**how)
    return task


def step_alone(task: Any, **how: Any) -> Any:
    task.training_step = torch.compile(task.training_step, **how)
    return task


class Called(Task):
    """Calls itself, as LightningModules with a forward do."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def by_name(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that `torch.compile` puts into names."""
    return {name.replace("_orig_mod.", ""): value for name, value in found.items()}


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


SOME_COMPILED = [
    pytest.param(how, marks=[] if how in (whole, submodule, submodule_in_place) else [pytest.mark.slow])
    for how in (whole, submodule, submodule_in_place, layer, layer_in_place, task_in_place, step_alone)
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("way", ["callback", pytest.param("wrapper", marks=pytest.mark.slow)])
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("compiled", SOME_COMPILED)
def test_compiled(compiled, ran_before, way):
    """Hooks put on code that ran compiled before would never fire, silently."""
    context = Context(Called)
    task = context.make()
    fitted = task if way == "callback" else OTRTModule(task, make_teacher(), **EXACT)
    fitted = compiled(fitted, backend="eager")
    if ran_before:
        before = weights(task)
        task.net(next(iter(loader()))[0]).sum().backward()
        with torch.no_grad():
            task(next(iter(loader()))[0])
        task.zero_grad()
        task.load_state_dict(before)
    context.fit(fitted, callbacks=[OTRTCallback(make_teacher(), **EXACT)] if way == "callback" else [])
    assert_agree(by_name(weights(task)), by_hand(context), without(context))
    assert not hooks(task)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [submodule, pytest.param(layer_in_place, marks=pytest.mark.slow)])
def test_compiled_as_one_graph(compiled):
    context = Context()
    task = compiled(context.make(), backend="eager", fullgraph=True)
    context.fit(task, callbacks=[OTRTCallback(make_teacher(), **EXACT)])
    assert_agree(by_name(weights(task)), by_hand(context), without(context))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_longer_fits_compile_no_more():
    """Flags that change from step to step, or between training and validation, would be compiled anew each time."""

    def graphs(steps: int) -> int:
        torch.compiler.reset()
        found: list[int] = []

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            found.append(1)
            return graph.forward

        task = make_task(ValidatedTask)
        task.net = torch.compile(task.net, backend=backend)
        callback = OTRTCallback(make_teacher(), **EXACT, schedule=LinearWarmup(100))
        make_trainer(max_steps=steps, callbacks=[callback], val_check_interval=2, num_sanity_val_steps=1).fit(
            task, loader(), loader(16)
        )
        return len(found)

    assert 0 < graphs(5) == graphs(12)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_by_inductor():
    context = CONTEXTS["32-true"]
    task = submodule(context.make())
    context.fit(task, callbacks=[OTRTCallback(make_teacher(), **EXACT)])
    assert_agree(by_name(weights(task)), by_hand(context), without(context), context.tolerance)
