"""Several forwards in one step: views, closures of LBFGS, attacks, and the players of a GAN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    LAYERS,
    Task,
    assert_agree,
    assert_same,
    loader,
    make_task,
    make_teacher,
    make_trainer,
    weights,
)
from torch import Tensor, nn
from torch.nn import functional as F
from trainer.contexts import EXACT, Context, HandMade, by_callback, by_hand, by_wrapper, without

from lightning_otrt import OTRTCallback, OTRTModule, RepresentationTransfer, neurons, transport_distance


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
    counts = [[pair.sums[0].item() for pair in seen[kind].states] for kind in (LBFGS, Task)]
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


class SharedFake(TwoPlayers):
    """Both players are updated after one forward of the generator, as in the DCGAN of torch's examples."""

    retains = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        fake = self.net(batch[0])
        second.zero_grad()
        self.manual_backward(self.critic(fake.detach()).mean(), retain_graph=self.retains)
        second.step()
        first.zero_grad()
        self.manual_backward(self.add(-self.critic(fake).mean()))
        first.step()


class SharedFakeRetained(SharedFake):
    retains = True


@pytest.mark.parametrize("kind", [SharedFake, SharedFakeRetained])
def test_the_critics_loss_does_not_take_the_term(kind):
    """It would end in gradients that the generator's optimizer sets to zero."""
    context = Context(kind, trainer=lambda: {"max_epochs": 1}, options={"toggle": False})
    found = by_callback(context, NothingLeft())
    assert_agree(found, by_hand(context), without(context))


class BothLearn(SharedFake):
    """The critic has a teacher of its own; notes what its backward pass gives the generator."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        fake = self.net(batch[0])
        first.zero_grad()
        self.manual_backward(self.critic(fake.detach()).square().mean())
        assert all(parameter.grad is None for parameter in self.net.parameters())
        assert all(parameter.grad is not None for parameter in self.critic.parameters())
        second.step()
        self.manual_backward(-self.critic(fake).mean())
        assert all(parameter.grad is not None for parameter in self.net.parameters())
        first.step()


def test_each_of_two_teachers_has_its_own_backward_pass():
    task, critic = BothLearn(toggle=False), nn.Linear(3, 2)
    callbacks = [
        OTRTCallback(make_teacher(), LAYERS, weight=1e-3),
        OTRTCallback(critic, {"critic": ""}, student_root="critic", weight=1e-3),
    ]
    make_trainer(max_epochs=1, callbacks=callbacks).fit(task, loader())
    assert all(callback.transfer.engine.calls for callback in callbacks)


class CriticAlone(SharedFake):
    """Some steps are the critic's alone."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if batch_idx % 2:
            super().training_step(batch, batch_idx)
            return
        _, second = self.optimizers()
        second.zero_grad()
        self.manual_backward(self.critic(self.net(batch[0]).detach()).mean())
        second.step()
        if isinstance(self.term, HandMade):
            self.term.discard()


def test_steps_of_the_critic_alone_have_no_term():
    context = Context(CriticAlone, trainer=lambda: {"max_epochs": 1}, options={"toggle": False})
    found = by_callback(context, NothingLeft())
    assert_agree(found, by_hand(context), without(context))


class TwoLossesOfOneForward(SharedFake):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        fake = self.net(batch[0])
        self.manual_backward(self.critic(fake).mean())
        self.manual_backward(fake.square().mean())


def test_a_graph_that_an_earlier_backward_freed_is_explained():
    context = Context(TwoLossesOfOneForward, trainer=lambda: {"max_epochs": 1}, options={"toggle": False})
    with pytest.raises(RuntimeError, match="The transfer term was added to an earlier `self.manual_backward`"):
        by_callback(context)
