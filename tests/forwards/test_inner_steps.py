"""Forwards that are not trained on, of attacks, inner steps and the other player: an error, or left out by `paused`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import pytest
import torch
import torchvision
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from old_versions import needs_freed_graphs
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from lightning_otrt import OTRTCallback, RepresentationTransfer

Context = Callable[[], AbstractContextManager[Any]]
WORDS = r"(?s)A backward pass has gone through 1 of the 2 forwards.*with transfer\.paused\(\):.*torch\.autograd\.grad"


def mlp(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


def bert(width: int = 8) -> nn.Module:
    config = BertConfig(vocab_size=20, hidden_size=width, num_hidden_layers=2, num_attention_heads=2)
    config.intermediate_size, config.hidden_dropout_prob, config.attention_probs_dropout_prob = 16, 0.0, 0.0
    return BertModel(config, add_pooling_layer=False)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 8, generator=generator), torch.arange(12) % 3


def fast_gradient(net: nn.Module, inner: Context) -> Tensor:
    x, y = data()
    x.requires_grad_()
    with inner():
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), y), x)
    return F.cross_entropy(net((x + 0.1 * gradient.sign()).detach()), y)


def projected_gradient(net: nn.Module, inner: Context) -> Tensor:
    """On a network of torchvision, with the gradient of `backward`."""
    x, y = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    shift = torch.zeros_like(x, requires_grad=True)
    with inner():
        F.cross_entropy(net(x + shift), y).backward()
    net.zero_grad()
    return F.cross_entropy(net(x + 0.01 * shift.grad.sign()), y)


def shifted_embeddings(net: nn.Module, inner: Context) -> Tensor:
    """On a network of Hugging Face, whose embeddings are attacked."""
    embedded = net.embeddings.word_embeddings(torch.arange(20).view(4, 5)).detach().requires_grad_()
    with inner():
        (gradient,) = torch.autograd.grad(net(inputs_embeds=embedded).last_hidden_state.square().mean(), embedded)
    return net(inputs_embeds=embedded.detach() + 0.1 * gradient).last_hidden_state.square().mean()


def meta_step(net: nn.Module, inner: Context) -> Tensor:
    """One step of first-order meta-learning."""
    x, y = data()
    weights = dict(net.named_parameters())
    with inner():
        gradients = torch.autograd.grad(F.cross_entropy(net(x[:6]), y[:6]), list(weights.values()))
    adapted = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
    return F.cross_entropy(functional_call(net, adapted, (x[6:],)), y[6:])


def checkpointed(net: nn.Module, inner: Context) -> Tensor:
    def forward(x: Tensor) -> Tensor:
        return net[2](checkpoint(nn.Sequential(net[0], net[1]), x, use_reentrant=False))

    net.forward = forward  # type: ignore[method-assign]
    return fast_gradient(net, inner)


STEPS: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[nn.Module, Context], Tensor]]] = {
    "fast gradient": (mlp, {"1": "1"}, fast_gradient),
    "projected gradient": (
        lambda: torchvision.models.resnet18(num_classes=4, norm_layer=nn.Identity),
        {"layer1": "layer1", "layer3": "layer3"},
        projected_gradient,
    ),
    "shifted embeddings": (bert, ["encoder.layer.0", "encoder.layer.1"], shifted_embeddings),
    "meta-learning": (mlp, {"1": "1"}, meta_step),
    "checkpointing": (mlp, {"0": "0"}, checkpointed),
}


@needs_freed_graphs
@pytest.mark.parametrize("name", STEPS)
def test_the_error_says_how_to_leave_an_inner_step_out(name: str) -> None:
    build, layers, step = STEPS[name]
    torch.manual_seed(0)
    student = build()
    transfer = RepresentationTransfer(copy.deepcopy(student), layers)
    with transfer.attached(student):
        step(student, nullcontext)
        with pytest.raises(RuntimeError, match=WORDS):
            transfer.loss()
        assert not transfer.views


@pytest.mark.parametrize("name", STEPS)
def test_with_paused_the_term_is_that_of_the_forward_that_is_trained_on(name: str) -> None:
    build, layers, step = STEPS[name]
    torch.manual_seed(0)
    student, teacher = build(), build()
    transfer = RepresentationTransfer(teacher, layers, weight=1.0)
    with transfer.attached(student):
        task = step(student, transfer.paused)
        (view,) = transfer.views
        readings = {key: (view.student[key][0].detach(), view.teacher[key][0]) for key in view.student}
        loss = transfer.loss()
        (task + loss).backward()
    # By hand: one minus the correlation of the neurons of this forward, under the plan that was used.
    expected = 0.0
    for key, (y, x) in readings.items():
        pair, distance = transfer.pairs[int(key)], transfer.distances[int(key)]
        y, x = (side.movedim(1, 0).flatten(1).double() for side in (y, x))
        alive = [side.std(1) > 1e-6 for side in (y, x)]
        y, x = ((side - side.mean(1, keepdim=True)) for side in (y, x))
        y, x = (side / side.norm(dim=1, keepdim=True).clamp_min(1e-12) for side in (y, x))
        cost = 1 - y @ x.T
        cost[~alive[0][:, None] & ~alive[1][None]] = 0
        expected += pair.weight * float((distance.plan * cost).sum())
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-4)


def test_a_penalty_on_gradients_keeps_its_graph_and_is_no_error() -> None:
    """Its forward is one of two that are trained on."""
    student, transfer = mlp(), RepresentationTransfer(mlp(), {"1": "1"})
    x, y = data()
    x.requires_grad_()
    with transfer.attached(student):
        (gradient,) = torch.autograd.grad(student(x).sum(), x, create_graph=True)
        loss = F.cross_entropy(student(x), y) + gradient.square().mean() + transfer.loss()
        loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


@needs_freed_graphs
def test_a_backward_pass_before_the_term_is_named_too() -> None:
    student, transfer = mlp(), RepresentationTransfer(mlp(), {"1": "1"})
    x, y = data()
    with transfer.attached(student):
        F.cross_entropy(student(x), y).backward()
        with pytest.raises(RuntimeError, match=r"(?s)1 of the 1 forwards.*call `transfer\.loss\(\)` before"):
            transfer.loss()


@needs_freed_graphs
def test_not_strict_leaves_the_term_out() -> None:
    student, transfer = mlp(), RepresentationTransfer(mlp(), {"1": "1"}, strict=False)
    with transfer.attached(student):
        for step in range(5):
            task = fast_gradient(student, nullcontext)
            with pytest.warns(UserWarning, match="A backward pass") if step == 0 else nullcontext():
                loss = transfer.loss()
            (task + loss).backward()
            assert loss == 0


def test_the_first_calls_alone_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones cost nothing."""
    looks = []
    monkeypatch.setattr("lightning_otrt.teacher.attachment.check_graphs", looks.append)
    student, transfer = mlp(), RepresentationTransfer(mlp(), {"1": "1"})
    with transfer.attached(student):
        for _ in range(8):
            student(data()[0])
            transfer.loss()
    assert len(looks) == 3


class Attacked(BoringModel):
    """Lightning's demo module under attack."""

    paused: Context = nullcontext

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        batch = batch.clone().requires_grad_()
        with self.paused():
            (gradient,) = torch.autograd.grad(self.loss(self.layer(batch)), batch)
        return self.loss(self.layer(batch.detach() + 0.1 * gradient.sign()))


@pytest.mark.parametrize("paused", [pytest.param(False, marks=needs_freed_graphs), True])
def test_a_fit_of_the_demo_module(paused: bool) -> None:
    task = Attacked()
    task.layer = nn.Sequential(nn.Linear(32, 5), nn.Tanh(), nn.Linear(5, 2))
    callback = OTRTCallback(nn.Sequential(nn.Linear(32, 6), nn.Tanh()), {"layer.1": "1"})
    if paused:
        task.paused = callback.transfer.paused
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[callback],
    )
    loader = DataLoader(RandomDataset(32, 32), batch_size=8)
    with nullcontext() if paused else pytest.raises(RuntimeError, match=WORDS):
        trainer.fit(task, loader)
    assert (callback.transfer.engine.calls == 4) == paused


class Adversarial(L.LightningModule):
    """A generator that learns from a teacher, and a critic whose step runs the generator too."""

    def __init__(self, transfer: RepresentationTransfer, paused: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 8))
        self.critic = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))
        self.critic_step = transfer.paused if paused else nullcontext
        self.losses: list[tuple[float, float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        generating, criticising = self.optimizers()
        noise = torch.randn(len(batch), 4)
        with self.critic_step():
            fake = self.generator(noise)
        before = [parameter.grad for parameter in self.generator.parameters()]
        self.manual_backward(self.critic(fake.detach()).mean() - self.critic(batch).mean())
        reached = any(p.grad is not g for p, g in zip(self.generator.parameters(), before, strict=True))
        criticising.step()
        criticising.zero_grad()
        generating.zero_grad()
        self.manual_backward(-self.critic(self.generator(noise)).mean())
        generating.step()
        generating.zero_grad()
        criticising.zero_grad()
        self.losses.append((float(reached), float(self.trainer.callback_metrics["train/otrt"])))

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.generator, self.critic)]


@pytest.mark.parametrize("paused", [False, True])
def test_the_step_of_a_critic_has_no_term(paused: bool) -> None:
    teacher = nn.Sequential(nn.Linear(4, 9), nn.Tanh())
    transfer = RepresentationTransfer(teacher, {"generator.1": "1"}, student_root="generator")
    task = Adversarial(transfer, paused)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[OTRTCallback(transfer)],
    )
    trainer.fit(task, DataLoader(torch.randn(32, 8), batch_size=16))
    # The critic's loss does not depend on the generator, so that its backward pass takes no term, in either case.
    assert [reached for reached, _ in task.losses] == [0.0] * 2
    assert transfer.engine.calls == 2


@pytest.mark.parametrize("transform", ["grad", "vmap"])
@pytest.mark.parametrize("step", [0, 1])
def test_transforms_of_functions_have_to_be_paused(transform: str, step: int) -> None:
    student, teacher = (nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)) for width in (8, 9))
    x = torch.randn(5, 6)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(student, parameters, (x,)).square().mean()

    def run() -> Any:
        parameters = {name: parameter.detach() for name, parameter in student.named_parameters()}
        if transform == "grad":
            return torch.func.grad(loss)(parameters, x)
        return torch.func.vmap(loss, (None, 0))(parameters, x[:, None])

    transfer = RepresentationTransfer(teacher, "penultimate", plan="random")
    with transfer.attached(student):
        for _ in range(step):
            student(x)
            transfer.loss()
        with pytest.raises(RuntimeError, match=r"transfer\.paused\(\)"):
            run()
        with transfer.paused():
            run()
        student(x)
        assert torch.isfinite(transfer.loss())
