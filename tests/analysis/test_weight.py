"""The weight that is suggested gives the wanted share of the gradient, and asking for it changes nothing."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from analysis.gradients_by_hand import NET_LAYERS, norms_by_hand
from helpers import LAYERS, assert_same, hooks, loader, make_task, make_teacher, weights
from torch import nn
from torch.nn import functional as F

from lightning_otrt import LinearWarmup, OTRTCallback, RepresentationTransfer
from lightning_otrt.analysis.weight import suggest_weight


def test_gradients_have_the_ratio_at_the_weight():
    student, teacher = make_task().net, make_teacher()
    batch = next(iter(loader(batch_size=32)))
    suggestion = suggest_weight(
        student, RepresentationTransfer(teacher, NET_LAYERS), [batch], loss_fn=F.cross_entropy, ratio=0.5
    )
    task, own = norms_by_hand(student, RepresentationTransfer(teacher, NET_LAYERS, weight=suggestion.weight), batch)
    assert math.hypot(*own) / math.hypot(*task) == pytest.approx(0.5, rel=1e-3)
    assert list(suggestion.task_norms.values()) == pytest.approx(task, rel=1e-3)
    assert "block2" in str(suggestion)
    assert suggestion.batches == 1


def test_ways_to_give_the_loss_agree():
    task, teacher = make_task(), make_teacher()
    found = [
        suggest_weight(task, RepresentationTransfer(teacher, LAYERS), loader()).weight,
        suggest_weight(task, OTRTCallback(teacher, LAYERS), loader()).weight,
        suggest_weight(task, RepresentationTransfer(teacher, LAYERS), loader(), task_loss=task.loss).weight,
        suggest_weight(task.net, teacher, loader(), loss_fn=F.cross_entropy).weight,
    ]
    assert found == pytest.approx([found[0]] * 4)


def test_nothing_changes():
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


def test_a_transfer_that_has_run_goes_on_as_if_nothing_was():
    values = []
    batches = [(x.double(), y) for x, y in loader()]
    for asks in (False, True):
        task = make_task().double()
        transfer = RepresentationTransfer(make_teacher().double(), LAYERS, memory=0.9)
        optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
        for part in (slice(0, 3), slice(3, 6)):
            with transfer.attached(task):
                for batch in batches[part]:
                    loss = task.loss(batch) + transfer.loss()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            if asks:
                suggest_weight(task, transfer, batches)
        values.append(loss.item())
    assert values[1] == pytest.approx(values[0], rel=1e-12)


def test_under_no_grad():
    with torch.no_grad():
        assert suggest_weight(make_task(), RepresentationTransfer(make_teacher(), LAYERS), loader()).weight > 0


def test_more_batches_than_there_are():
    assert suggest_weight(make_task(), make_teacher(), islice(loader(), 2), max_batches=9).batches == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 0}, ValueError, "`ratio` to be positive"),
        ({"ratio": True}, ValueError, "`ratio` to be positive"),
        ({"max_batches": 0}, ValueError, "`max_batches` to be a positive integer"),
        ({"task_loss": lambda batch: 1.0}, TypeError, "`task_loss` to return a scalar loss with gradient"),
    ],
)
def test_errors(options, error, message):
    task = make_task()
    with pytest.raises(error, match=message):
        suggest_weight(task, make_teacher(), loader(), **options)
    assert hooks(task) == []


def test_errors_of_the_networks():
    net, teacher = make_task().net, make_teacher()
    with pytest.raises(TypeError, match="has no `training_step`"):
        suggest_weight(net, teacher, loader())
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


def test_a_teacher_with_a_part_of_the_name_transfer():
    """As adapters have. It is the teacher that is matched, not its part."""

    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.transfer = make_teacher(), nn.Linear(2, 2)

        def forward(self, x):
            return self.net(x)

    task, teacher = make_task(), Teacher()
    found = suggest_weight(task, teacher, loader(), max_batches=1).weight
    expected = suggest_weight(task, RepresentationTransfer(teacher), loader(), max_batches=1).weight
    assert found == pytest.approx(expected)
