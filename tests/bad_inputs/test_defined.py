"""Defined behaviour: what looks like a mistake and is none, with its warnings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_inputs.fits import NAN, Fit, assert_nothing_left, batches, named, state_of
from bad_inputs.messages import assert_message, collected_warnings
from bad_inputs.networks import EvaluationNet, Grid, OddStrategy, OtherTask, Tokens, Unhooked, frozen, special, with_net
from bad_inputs.outcomes import Log, Seen, check_all, check_none, check_steps, check_terms, check_value
from helpers import CLASSES, LAYERS, Net, Task, assert_same, loader, make_data, make_task, make_teacher, seeded, weights
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_otrt import OTRTCallback

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(6))


def dead(net: Net) -> Net:
    """Both blocks give zeros."""
    for block in (net.block1, net.block2):
        block[1].weight.data.zero_()
        block[1].bias.data.fill_(-1.0)
    return net


def dead_task() -> Task:
    task = make_task()
    dead(task.net)
    return task


class Spoiling(Task):
    """NaN in the student from the second step on."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if batch_idx == 1:
            self.net.block2[0].weight.data.fill_(NAN)
        return super().training_step(batch, batch_idx)


def spoilt_later(x: Tensor) -> Tensor:
    """Inputs that give the teacher NaN in the second batch of eight."""
    return x * NAN if torch.equal(x, make_data().tensors[0][8:16]) else x


class HeadOptimizer(Task):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.head.parameters(), lr=0.1)


class SumOfLosses(Task):
    """Defined for batches of none."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")


class NoStep(Task):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        return None


def compiled_task() -> Task:
    """Compiled and run before the fit, so that the code has no hooks in it."""
    task = make_task()
    task.net = torch.compile(task.net, backend="eager")
    task.net(IMAGES)
    return task


def check_two_to_one(seen: Seen) -> None:
    check_all(seen)
    parts = [seen.logged[-1][f"otrt/distance/net.block1-{teacher}"] for teacher in ("block1", "block2")]
    assert sum(parts) / 2 == pytest.approx(seen.terms[-1])


def check_equal(seen: Seen) -> None:
    """Nothing to learn at the start, and something to keep later."""
    assert seen.terms[0] == pytest.approx(0, abs=1e-3)
    assert seen.terms[1] > 10 * seen.terms[0]
    assert seen.is_changed


def check_no_effect(seen: Seen) -> None:
    check_terms(seen)
    assert not seen.is_changed


def check_spoilt(seen: Seen) -> None:
    """NaN is left in the loss, and kept out of the plans."""
    assert [term == term for term in seen.terms] == [True, False, False]
    assert all(state["plan"].isfinite().all() for state in seen.transfer.state_dict()["engine"]["pairs"])


def check_untrained(seen: Seen) -> None:
    assert not seen.logged
    assert_same(weights(seen.task), weights(make_task()))


def check_other_callback(seen: Seen) -> None:
    check_all(seen)
    assert all("train/otrt-2" in values for values in seen.logged)


def dies(side: str, *layers: str) -> list[str]:
    return [f"{side} layer '{layer}' is constant over the first batch: all of its" for layer in layers]


DEFINED: list[tuple[Fit, list[str], Callable[[Seen], None]]] = [
    (Fit("batch of one with maps", data=lambda: batches(1, 1)), [], check_all),
    (
        Fit("batch of one, euclidean", layers="penultimate", options={"cost": "euclidean"}, data=lambda: batches(1, 1)),
        [],
        check_all,
    ),
    (Fit("smaller last batch", data=lambda: batches(8, 8, 3)), [], check_all),
    (
        Fit("last batches too small", layers="penultimate", data=lambda: batches(8, 1, 8, 1)),
        ["'net.dropout:input' -> 'dropout:input' has 1 observations, and 'correlation' needs at least 3: the pair"],
        check_steps(True, False, True, False),
    ),
    (
        Fit(
            "all batches too small, not strict",
            layers="penultimate",
            options={"strict": False},
            data=lambda: batches(1, 1),
        ),
        ["'net.dropout:input' -> 'dropout:input' has 1 observations, and 'correlation' needs at least 3: the pair"],
        check_none,
    ),
    (
        Fit("a batch of none later", task=lambda: make_task(SumOfLosses, norm=False), data=lambda: batches(8, 0, 8)),
        [f"'net.block{i}' -> 'block{i}' has 0 observations" for i in (1, 2)],
        check_steps(True, False, True),
    ),
    (
        Fit("empty loader", data=lambda: DataLoader([])),
        ["Total length of `DataLoader`", "Total length of `Combined"],
        check_untrained,
    ),
    (Fit("dead student", task=dead_task), dies("Student", "net.block1", "net.block2"), check_value(1, changed=False)),
    (
        Fit("dead teacher", teacher=lambda _: dead(make_teacher())),
        dies("Teacher", "block1", "block2"),
        check_value(1, changed=False),
    ),
    (
        Fit("dead on both sides", task=dead_task, teacher=lambda _: dead(make_teacher())),
        [*dies("Student", "net.block1", "net.block2"), *dies("Teacher", "block1", "block2")],
        check_value(0, changed=False),
    ),
    (
        Fit("dead teacher, euclidean", teacher=lambda _: dead(make_teacher()), options={"cost": "euclidean"}),
        [],
        check_all,
    ),
    (Fit("dead student, euclidean", task=dead_task, options={"cost": "euclidean"}), [], check_terms),
    (
        Fit("two teacher layers for one", layers=[("net.block1", "block1"), ("net.block1", "block2")]),
        [],
        check_two_to_one,
    ),
    (Fit("one teacher layer for two", layers=[("net.block1", "block1"), ("net.block2", "block1")]), [], check_all),
    (Fit("the networks themselves", layers={"net": ""}), [], check_all),
    (Fit("other sizes of maps", layers=named("net.block1", "block2")), [], check_all),
    (
        Fit(
            "other counts of tokens",
            layers=named("net.norm", "norm"),
            task=lambda: with_net(Tokens),
            teacher=lambda _: seeded(1, Tokens, (4, 4)),
        ),
        [],
        check_all,
    ),
    (
        Fit("tokens with a map", layers=named("net.norm", "block1"), task=lambda: with_net(Tokens)),
        [],
        check_all,
    ),
    (Fit("map with a vector", layers=named("net.block1", "head")), [], check_all),
    (Fit("tuple with one tensor", layers=named("net.special"), task=special(lambda y: (y, None))), [], check_all),
    (
        Fit(
            "volumes",
            layers=named("net.conv", "conv"),
            task=lambda: with_net(Video),
            teacher=lambda _: seeded(1, Video, 6),
        ),
        [],
        check_all,
    ),
    (
        Fit(
            "channels last",
            layers=named("net.norm", "norm"),
            task=lambda: with_net(Grid),
            teacher=lambda _: seeded(1, Grid, 6),
        ),
        [],
        check_all,
    ),
    (
        Fit(
            "given axis",
            layers=named("net.gate", "gate", neuron_axis=-1),
            task=lambda: with_net(Grid),
            teacher=lambda _: seeded(1, Grid),
        ),
        [],
        check_all,
    ),
    (
        Fit("teacher of the other package", layers=named("net.block1", "net.block1"), teacher=lambda _: OtherTask()),
        [],
        check_all,
    ),
    (Fit("teacher without gradient", teacher=lambda _: make_teacher().requires_grad_(False)), [], check_all),
    (
        Fit(
            "teacher equal by content",
            layers=named("net.block1"),
            teacher=lambda task: copy.deepcopy(task.net).eval(),
            task=lambda: make_task(norm=False),
        ),
        [],
        check_equal,
    ),
    (Fit("weight of zero", options={"weight": 0.0}), [], check_none),
    (
        Fit("schedule of zero throughout", options={"schedule": lambda step: 0.0}),
        ["weight of the transfer term was 0 in all 2 training steps of this fit, because `schedule`"],
        check_none,
    ),
    (
        Fit("epsilon of a uniform plan", options={"epsilon": 0.9}),
        [
            f"The transport plan of 'net.block{i}' -> 'block{i}' is nearly uniform, so that it matches almost nothing"
            for i in (1, 2)
        ],
        check_all,
    ),
    (
        Fit("one of two layers frozen", task=frozen("net.block1")),
        ["The student layers ['net.block1'] get no gradient"],
        check_all,
    ),
    (
        Fit("layers that no optimizer holds", task=lambda: make_task(HeadOptimizer)),
        ["The transfer term has no effect: it reaches the parameters ['net.block1.0.bias'"],
        check_no_effect,
    ),
    (
        Fit("NaN in the student later", task=lambda: make_task(Spoiling), data=lambda: loader(24)),
        ["Up to step 2, 1 recent values of the transfer term were NaN or infinite"],
        check_spoilt,
    ),
    (
        Fit("NaN in the teacher later", options={"teacher_inputs": spoilt_later}, data=lambda: loader(24)),
        ["Up to step 2, 1 recent values of the transfer term were NaN or infinite"],
        check_spoilt,
    ),
    (
        Fit("student not called, not strict", task=lambda: make_task(Unhooked), options={"strict": False}),
        ["No forward of a module that holds the layers of the student (Unhooked) was recorded"],
        check_none,
    ),
    (
        Fit("layer that does not run, not strict", task=lambda: with_net(EvaluationNet), options={"strict": False}),
        ["The student layer 'net.block1' did not run in this forward"],
        check_all,
    ),
    (
        Fit(
            "recorded layers frozen, not strict",
            task=frozen("net.block1"),
            layers=named("net.block1"),
            options={"strict": False},
        ),
        ["The transfer term is constant: the student layers ['net.block1'] and all 4 parameters"],
        check_none,
    ),
    (
        Fit("strategy never run, not strict", options={"strict": False}, trainer=lambda: {"strategy": OddStrategy()}),
        ["OddStrategy was never tested with representation transfer"],
        check_all,
    ),
    (Fit("steps that return nothing", task=lambda: make_task(NoStep)), [], check_none),
    (
        Fit("two teachers for the same layers", others=lambda: [OTRTCallback(make_teacher(5), dict(LAYERS))]),
        [],
        check_other_callback,
    ),
    (Fit("compiled and run before the fit", task=compiled_task), [], check_all),
]


@pytest.mark.parametrize(("case", "words", "check"), DEFINED, ids=[case.name for case, _, _ in DEFINED])
def test_defined(case: Fit, words: list[str], check: Callable[[Seen], None]) -> None:
    task = case.task()
    teacher = case.teacher(task)
    before = state_of(teacher)
    log = Log()
    with collected_warnings() as messages:
        run = Fit(**{**vars(case), "others": lambda: [*case.others(), log]})
        transfer = run.run("callback", task, teacher)
    assert len(messages) == len(words), messages
    for message, word in zip(sorted(messages), sorted(words), strict=True):
        assert_message(message, (word,))
    assert_nothing_left(task, teacher)
    assert before == state_of(teacher)
    with collected_warnings():
        check(Seen(case, task, teacher, transfer, log.logged))


class Video(nn.Module):
    """Volumes (B, C, T, H, W)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv3d(1, width, 3, padding=1), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x[:, :, None].expand(-1, -1, 3, -1, -1)).mean((2, 3, 4)))
