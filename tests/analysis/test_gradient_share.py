"""The gradient is split into the parts of task and term, whatever the loss is multiplied by."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from analysis.gradients_by_hand import NET_LAYERS, norms_by_hand
from helpers import hooks, loader, make_task, make_teacher
from torch import nn
from torch.nn import functional as F

from lightning_otrt import LogitDistillation, RepresentationTransfer, suggest_weight
from lightning_otrt.analysis.gradient_share import GradientProbe
from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.reading.hooks.views import View


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_splits_any_multiple_of_the_loss(scale):
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
    assert norms.distillation.tolist() == [0, 0]
    for found, wanted in zip(norms[:2], expected, strict=True):
        assert [value / scale for value in found.tolist()] == pytest.approx(wanted, rel=1e-4)
    assert hooks(student, teacher) == []


@pytest.mark.parametrize("features", [None, "block2:input"])
def test_the_distillation_of_logits_is_a_part_of_its_own(features):
    """Against the gradients of each part alone."""
    student, teacher = make_task().net.double(), make_teacher().double()
    x, labels = next(iter(loader(batch_size=16)))
    outputs = {}
    for name in NET_LAYERS:
        student.get_submodule(name).register_forward_hook(
            lambda m, args, output, name=name: outputs.update({name: output})
        )
    transfer = RepresentationTransfer(teacher, NET_LAYERS, distillation=LogitDistillation(3.0, features=features))
    with transfer.attached(student):
        student(x.double())
        transfer.discard()
        probe = GradientProbe(student, transfer.pairs)
        with probe.watching():
            task = F.cross_entropy(student(x.double()), labels)
        views = list(transfer.views)
        total = transfer.loss()
        norms = probe.split(task + total, views)
        probe.remove()
    layers = [outputs[name] for name in NET_LAYERS]
    of_task = torch.autograd.grad(task, layers, retain_graph=True)
    of_both = torch.autograd.grad(total, layers, retain_graph=True)
    assert norms.task.tolist() == pytest.approx([float(grad.norm()) for grad in of_task], rel=1e-5)
    logits = views[0].logits if features is None else views[0].features[0]
    (flow,) = torch.autograd.grad(total, logits, retain_graph=True)
    parts = torch.autograd.grad(logits, layers, flow, retain_graph=True, allow_unused=True)
    parts = [torch.zeros(()) if part is None else part for part in parts]
    assert norms.distillation.tolist() == pytest.approx([float(part.norm()) for part in parts], rel=1e-5, abs=1e-9)
    rest = [float((both - part).norm()) for both, part in zip(of_both, parts, strict=True)]
    assert norms.transport.tolist() == pytest.approx(rest, rel=1e-5)
    assert min(norms.transport) > 0
    assert max(norms.distillation) > 0


def test_is_not_fooled_by_in_place_operations():
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
    assert found[1].transfer_norms == pytest.approx(found[0].transfer_norms, rel=1e-5)
    assert found[1].task_norms == pytest.approx(found[0].task_norms, rel=1e-5)
    assert found[0].weight > 0


def test_keeps_no_activation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3)
            self.outputs = []

        def forward(self, x):
            y = self.body(x)
            self.outputs.append(weakref.ref(y))
            return y + 1  # an operation that needs no activation for its gradient

    net = Net()
    probe = GradientProbe(net, [LayerPair("body", "body")])
    with probe.watching():
        loss = net(torch.randn(2, 4)).sum()
    assert probe.has_outputs([View("", {0: [torch.zeros(2, 3)]})])
    assert net.outputs[0]() is None
    assert [norm.tolist() for norm in probe.split(loss, [])] == [[pytest.approx(math.sqrt(6))], [0.0], [0.0]]
    probe.remove()
    assert hooks(net) == []


def test_sees_only_what_runs_with_gradient_inside_the_block():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    probe = GradientProbe(net, [LayerPair("0", "0"), LayerPair("1:input", "0")])
    views = [View("", {0: [torch.zeros(2, 3)], 1: [torch.zeros(2, 3)]})]
    net(torch.randn(2, 4))
    with probe.watching(), torch.no_grad():
        net(torch.randn(2, 4))
    assert not probe.has_outputs(views)
    with probe.watching():
        net(torch.randn(2, 4))
    assert probe.has_outputs(views)
    probe.remove()
    assert not probe.has_outputs(views)


def test_several_outputs_of_one_layer():
    """Each selected output has a share of its own."""

    class Both(nn.Module):
        def forward(self, x):
            return F.relu(x), F.tanh(x)

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first, self.both, self.head = nn.Linear(8, width), Both(), nn.Linear(2 * width, 3)

        def forward(self, x):
            return self.head(torch.cat(self.both(self.first(x)), 1))

    torch.manual_seed(0)
    student, x, labels = Net(6), torch.randn(32, 8), torch.randint(3, (32,))
    pairs = [LayerPair("both", "both", select=index) for index in (0, 1)]
    transfer = RepresentationTransfer(Net(9), pairs, weight=8.0)
    outputs = []
    student.both.register_forward_hook(lambda module, args, output: outputs.append(output))
    with transfer.attached(student):
        student(x)
        transfer.discard()
        probe = GradientProbe(student, transfer.pairs)
        with probe.watching():
            task = F.cross_entropy(student(x), labels)
        views = list(transfer.views)
        assert probe.has_outputs(views)
        norms = probe.split(task + (term := transfer.loss()), views)
        probe.remove()
    assert probe.names == ("both-0", "both-1")
    for found, loss in ((norms.task, task), (norms.transport, term)):
        wanted = torch.autograd.grad(loss, outputs[-1], retain_graph=True)
        assert found.tolist() == pytest.approx([float(each.norm()) for each in wanted], rel=1e-4)
