"""Settings of a fit, and the ways to train in them: callback, wrapper, context manager, and a loss by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from helpers import (
    LAYERS,
    Net,
    Task,
    hooks,
    loader,
    make_task,
    make_teacher,
    make_trainer,
    weights,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_otrt import OTRTCallback, OTRTModule, RepresentationTransfer, neurons, transport_distance

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


@dataclass(frozen=True, eq=False)
class Context:
    """A setting of a fit: the task and its options, and what makes the options of the trainer.

    With ``late`` the layers exist only during the fit, so that a hand-written loop cannot attach before it.
    :func:`by_hand` and :func:`without` fit once for each context, and no test changes what they return.
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


@functools.cache
def by_hand(context: Context) -> dict[str, Tensor]:
    task = context.make()
    task.term = HandMade(task, make_teacher())
    context.fit(task)
    return weights(task)


@functools.cache
def without(context: Context) -> dict[str, Tensor]:
    task = context.make()
    context.fit(task)
    return weights(task)


def by_name(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that `torch.compile` puts into names."""
    return {name.replace("_orig_mod.", ""): value for name, value in found.items()}
