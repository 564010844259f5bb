"""The share of the transfer term in the gradient, and the weight that is suggested from it."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from helpers import LAYERS, Task, assert_same, hooks, loader, make_task, make_teacher, weights
from torch import nn
from torch.nn import functional as F

from lightning_otrt import LinearWarmup, OTRTCallback, RepresentationTransfer
from lightning_otrt.analysis.gradient_share import GradientProbe
from lightning_otrt.analysis.weight import suggest_weight

NET_LAYERS = {"block1": "block1", "block2": "block2"}


def norms_by_hand(student, transfer, batch):
    """Both gradients by backward passes of their own, at copies of the outputs that nothing overwrites."""
    outputs = {}
    handles = [
        student.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output})
        )
        for name in NET_LAYERS
    ]
    with transfer.attached(student):
        task = F.cross_entropy(student(batch[0]), batch[1])
        term = transfer.loss()
    for handle in handles:
        handle.remove()
    kept = list(outputs.values())
    task_grads = torch.autograd.grad(task, kept, retain_graph=True)
    term_grads = torch.autograd.grad(term, kept)
    return [[grad.norm().item() for grad in grads] for grads in (task_grads, term_grads)]


class TestGradientProbe:
    @pytest.mark.parametrize("scale", [1.0, 1024.0])
    def test_splits_any_multiple_of_the_loss(self, scale):
        student, teacher = make_task().net, make_teacher()
        batch = next(iter(loader(batch_size=16)))
        transfer = RepresentationTransfer(teacher, NET_LAYERS, weight=8.0)
        expected = norms_by_hand(student, transfer, batch)
        transfer.reset()
        with transfer.attached(student):
            student(batch[0])
            transfer.discard()
            probe = GradientProbe(student, transfer.pairs)
            with probe.watching():
                task = F.cross_entropy(student(batch[0]), batch[1])
            views = list(transfer.views)
            norms = probe.split(scale * (task + transfer.loss()), views)
            probe.remove()
        assert probe.names == ("block1", "block2")
        for found, wanted in zip(norms, expected, strict=True):
            assert [value / scale for value in found.tolist()] == pytest.approx(wanted, rel=1e-4)
        assert hooks(student, teacher) == []

    def test_is_not_fooled_by_in_place_operations(self):
        class Net(nn.Module):
            def __init__(self, inplace):
                super().__init__()
                self.conv, self.relu = nn.Conv2d(1, 4, 3), nn.ReLU(inplace)
                self.head = nn.Linear(4, 3)

            def forward(self, x):
                return self.head(self.relu(self.conv(x)).mean((2, 3)))

        found = []
        for inplace in (False, True):
            torch.manual_seed(0)
            student, teacher = Net(inplace), Net(False)
            batch = next(iter(loader(batch_size=16)))
            transfer = RepresentationTransfer(teacher, {"conv": "conv"})
            found.append(suggest_weight(student, transfer, [batch], loss_fn=F.cross_entropy))
        assert found[0].transfer_norms == found[1].transfer_norms
        assert found[0].task_norms == found[1].task_norms
        assert found[0].weight > 0

    def test_keeps_no_activation(self):
        net = make_task().net
        probe = GradientProbe(net, [])
        assert not probe.has_outputs
        probe.remove()


class TestSuggestWeight:
    def test_gradients_have_the_fraction_at_the_weight(self):
        student, teacher = make_task().net, make_teacher()
        batch = next(iter(loader(batch_size=32)))
        suggestion = suggest_weight(
            student, RepresentationTransfer(teacher, NET_LAYERS), [batch], loss_fn=F.cross_entropy, fraction=0.5
        )
        task, own = norms_by_hand(student, RepresentationTransfer(teacher, NET_LAYERS, weight=suggestion.weight), batch)
        assert math.hypot(*own) / math.hypot(*task) == pytest.approx(0.5, rel=1e-3)
        assert list(suggestion.task_norms.values()) == pytest.approx(task, rel=1e-3)
        assert "block2" in str(suggestion)
        assert suggestion.batches == 1

    def test_ways_to_give_the_loss_agree(self):
        task, teacher = make_task(), make_teacher()
        found = [
            suggest_weight(task, RepresentationTransfer(teacher, LAYERS), loader()).weight,
            suggest_weight(task, OTRTCallback(teacher, LAYERS), loader()).weight,
            suggest_weight(task, RepresentationTransfer(teacher, LAYERS), loader(), task_loss=task.loss).weight,
            suggest_weight(task.net, teacher, loader(), loss_fn=F.cross_entropy).weight,
        ]
        assert found == pytest.approx([found[0]] * 4)

    def test_nothing_changes(self):
        task, teacher = make_task(dropout=0.5), make_teacher()
        task.net.block1.eval()
        transfer = RepresentationTransfer(teacher, LAYERS, weight=3.0, schedule=LinearWarmup(10))
        flags = [module.training for module in (*task.modules(), *teacher.modules())]
        before = weights(task), weights(teacher), torch.get_rng_state()
        suggest_weight(task, transfer, loader(shuffle=True))
        assert_same(weights(task), before[0])
        assert_same(weights(teacher), before[1])
        assert torch.equal(torch.get_rng_state(), before[2])
        assert [module.training for module in (*task.modules(), *teacher.modules())] == flags
        assert all(parameter.grad is None for parameter in task.parameters())
        assert hooks(task, teacher) == []
        assert (transfer.weight, transfer.step, transfer.is_attached) == (3.0, 0, False)
        assert isinstance(transfer.schedule, LinearWarmup)
        assert "log" not in vars(task)

    def test_a_transfer_that_has_run_goes_on_as_if_nothing_was(self):
        values = []
        for asks in (False, True):
            task = make_task()
            transfer = RepresentationTransfer(make_teacher(), LAYERS, memory=0.9)
            optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
            for part in (slice(0, 3), slice(3, 6)):
                with transfer.attached(task):
                    for batch in list(loader())[part]:
                        loss = task.loss(batch) + transfer.loss()
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                if asks:
                    suggest_weight(task, transfer, loader())
            values.append(loss.item())
        assert values[0] == values[1]

    def test_under_no_grad(self):
        with torch.no_grad():
            assert suggest_weight(make_task(), RepresentationTransfer(make_teacher(), LAYERS), loader()).weight > 0

    def test_more_batches_than_there_are(self):
        assert suggest_weight(make_task(), make_teacher(), islice(loader(), 2), batches=9).batches == 2

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"fraction": 0}, ValueError, "`fraction` to be positive"),
            ({"fraction": True}, ValueError, "`fraction` to be positive"),
            ({"batches": 0}, ValueError, "`batches` to be a positive integer"),
            ({"task_loss": 1, "loss_fn": 1}, TypeError, "but got both"),
            ({"task_loss": lambda batch: 1.0}, TypeError, "`task_loss` to return a scalar loss with gradient"),
        ],
    )
    def test_errors(self, options, error, message):
        task = make_task()
        with pytest.raises(error, match=message):
            suggest_weight(task, make_teacher(), loader(), **options)
        assert hooks(task) == []

    def test_errors_of_the_networks(self):
        net, teacher = make_task().net, make_teacher()
        with pytest.raises(TypeError, match="has no `training_step`"):
            suggest_weight(net, teacher, loader())
        with pytest.raises(TypeError, match=r"Expected batches \(x, y\)"):
            suggest_weight(net, teacher, [torch.randn(4, 1, 8, 8)], loss_fn=F.cross_entropy)
        with pytest.raises(ValueError, match="at least one batch"):
            suggest_weight(net, teacher, [], loss_fn=F.cross_entropy)
        with pytest.raises(TypeError, match="`student` to be a torch.nn.Module, but got str"):
            suggest_weight("resnet18", teacher, loader(), loss_fn=F.cross_entropy)
        frozen = make_task().net.requires_grad_(False)
        with pytest.raises(TypeError, match=r"without gradient \(is the student frozen\?\)"):
            suggest_weight(frozen, teacher, loader(), loss_fn=F.cross_entropy)
        lenient = RepresentationTransfer(teacher, "penultimate", strict=False)
        with (
            pytest.warns(UserWarning, match="the pair is skipped"),
            pytest.raises(ValueError, match="or no term could be computed"),
        ):
            suggest_weight(net, lenient, loader(batch_size=2), loss_fn=F.cross_entropy)
        other = nn.Parameter(torch.ones(()))

        def unrelated(batch):
            net(batch[0])
            return other * 1

        with pytest.raises(ValueError, match="the loss of the task has no gradient at the student layers"):
            suggest_weight(net, teacher, loader(), task_loss=unrelated)

    def test_a_training_step_that_needs_a_trainer(self):
        class NeedsTrainer(Task):
            def training_step(self, batch, batch_idx):
                return self.loss(batch) * self.trainer.max_epochs

        with pytest.raises(TypeError, match=r"needs a Trainer.*Pass `task_loss`"):
            suggest_weight(NeedsTrainer(), RepresentationTransfer(make_teacher(), LAYERS), loader())

        class Manual(Task):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

        with pytest.raises(TypeError, match="manual optimization"):
            suggest_weight(Manual(), RepresentationTransfer(make_teacher(), LAYERS), loader())

    def test_a_training_step_that_logs_and_returns_a_dictionary(self):
        class Logs(Task):
            def training_step(self, batch):
                loss = self.loss(batch)
                self.log("loss", loss)
                self.log_dict({"a": loss})
                return {"loss": loss}

        assert suggest_weight(Logs(), RepresentationTransfer(make_teacher(), LAYERS), loader()).weight > 0
