"""`plan="auto"`: a kind of plan for each pair, kept over checkpoints, refits and processes."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_problem import assert_close, batch, net
from helpers import LAYERS, ValidatedTask, loader, make_task, make_teacher, make_trainer
from lightning.pytorch.loggers import CSVLogger
from processes import run_processes
from torch import Tensor, nn

from lightning_otrt import OTRTCallback, OTRTMonitor, RepresentationTransfer, transport_distance

#: Behind a hyperbolic tangent, and a linear layer.
PAIRS = {"1": "1", "3": "3"}
KINDS = ("sinkhorn", "orthogonal")


def make_transfer(**options: Any) -> RepresentationTransfer:
    return RepresentationTransfer(net(6, seed=2), PAIRS, plan="auto", **options)


def train(transfer: RepresentationTransfer, student: nn.Module, calls: range, part: int | None = None) -> list[Tensor]:
    """Terms and gradients of calls of six samples, or of one process's half of them."""
    found = []
    with transfer.attached(student):
        for call in calls:
            x, _ = batch(call, (2, 4))
            student(x if part is None else x.split([2, 4])[part])
            term = transfer.loss()
            gradients = torch.autograd.grad(term, list(student.parameters())[:4])
            if part is not None:
                for gradient in gradients:
                    dist.all_reduce(gradient.div_(dist.get_world_size()))
            found += [term.detach(), *gradients]
    transfer.synchronize()
    return found


def test_term_is_the_mean_of_the_pairs_each_by_its_own_plan() -> None:
    transfer, student = make_transfer(weight=1.0, memory=0, solve_every=1, epsilon=0.05), net(4, seed=1)
    transfer.report = (lines := []).append
    train(transfer, student, range(2))
    assert transfer.engine.plans == KINDS
    assert re.findall(r"sinkhorn|orthogonal|plan", lines[0].splitlines()[-3]) == ["plan"]
    assert [line.split()[-1] for line in lines[0].splitlines()[-2:]] == list(KINDS)
    assert [distance.alignment is None for distance in transfer.distances] == [True, False]
    values = []
    for pair, kind in zip(PAIRS, KINDS, strict=True):
        single = RepresentationTransfer(
            net(6, seed=2), {pair: pair}, plan=kind, weight=1.0, memory=0, solve_every=1, epsilon=0.05
        )
        student = net(4, seed=1)
        with single.attached(student):
            for call in range(2):
                student(batch(call, (2, 4))[0])
                term = single.loss().detach()
        values.append(term)
    assert_close(torch.stack([distance.value for distance in transfer.distances]), torch.stack(values))


def test_a_resumed_run_keeps_its_plans_and_is_the_uninterrupted_one() -> None:
    options = {"memory": 0.9, "solve_every": 3}
    straight, stopped = make_transfer(**options), make_transfer(**options)
    student = net(4, seed=1)
    expected = train(straight, student, range(7))[-10:]
    train(stopped, student, range(5))
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = make_transfer(**options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.report = (lines := []).append
    found = train(resumed, student, range(5, 7))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert [line.split()[-1] for line in lines[0].splitlines()[-2:]] == list(KINDS)
    named = RepresentationTransfer(net(6, seed=2), PAIRS, plan="orthogonal", **options)
    named.load_state_dict(stopped.state_dict())
    with pytest.raises(ValueError, match="saved with plan='auto', but this run has plan='orthogonal'"):
        train(named, student, range(5, 6))


class Shifted(nn.Module):
    """A linear stream that a batch of large inputs pushes above 0 throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 2)
        self.layer.weight.data = torch.eye(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


def test_the_plans_of_a_checkpoint_go_on_whatever_the_batch_says() -> None:
    low, high = torch.randn(8, 3), torch.rand(8, 3)
    first = RepresentationTransfer(Shifted(), {"layer": "layer"}, plan="auto")
    student = Shifted()
    for x, transfer in ((low, first), (high, RepresentationTransfer(Shifted(), {"layer": "layer"}, plan="auto"))):
        if transfer is not first:
            transfer.load_state_dict(first.state_dict())
        with transfer.attached(student):
            student(x)
            transfer.loss()
        assert transfer.engine.plans == ("orthogonal",)
        assert transfer.pairing.plans == ("orthogonal",)
    # Attached again it goes on; after a reset it chooses anew.
    with first.attached(student):
        student(high)
        first.loss()
    assert first.engine.plans == ("orthogonal",)
    first.reset()
    with first.attached(student):
        student(high)
        first.loss()
    assert first.engine.plans == ("sinkhorn",)


def on_two(options: dict[str, Any]) -> list[Tensor]:
    return train(make_transfer(**options), net(4, seed=1), range(7), dist.get_rank())


@pytest.mark.parametrize("memory", [pytest.param(0, marks=pytest.mark.slow), 0.9])
def test_two_processes_are_one(memory: float) -> None:
    options = {"memory": memory, "solve_every": 3}
    expected = train(make_transfer(**options), net(4, seed=1), range(7))
    for found in run_processes(2, on_two, options):
        assert_close(found, expected)


def first_decides() -> tuple[str, ...]:
    x = torch.randn(8, 3) if dist.get_rank() == 0 else torch.rand(8, 3)
    transfer, student = RepresentationTransfer(Shifted(), {"layer": "layer"}, plan="auto"), Shifted()
    with transfer.attached(student):
        student(x)
        transfer.loss()
    return transfer.engine.plans


def test_the_first_process_chooses_for_all() -> None:
    assert run_processes(2, first_decides) == [("orthogonal",)] * 2


def test_monitor(tmp_path: Path) -> None:
    """Pairs are measured and drawn as their own kind."""
    layers = {**LAYERS, "net.block1.0": "block1.0"}
    callback, logger = OTRTCallback(make_teacher(), layers, plan="auto"), CSVLogger(tmp_path)
    trainer = make_trainer(callbacks=[callback, OTRTMonitor(1)], logger=logger, max_epochs=1)
    trainer.fit(make_task(ValidatedTask), loader(), loader(16))
    kinds = dict(zip(layers, callback.transfer.engine.plans, strict=True))
    assert set(kinds.values()) == set(KINDS)
    header = Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0].split(",")
    for layer, kind in kinds.items():
        assert (f"otrt/directions/{layer}" in header) == (kind == "orthogonal")
        assert (f"otrt/entropy/{layer}" in header) == (kind == "sinkhorn")
        assert f"val/otrt/{layer}" in header
        folder = "singular_values" if kind == "orthogonal" else "plan"
        assert (Path(logger.log_dir) / "otrt" / folder / layer).exists()


@pytest.mark.parametrize("cost", ["euclidean", "covariance", torch.cdist])
def test_other_costs_are_refused(cost: Any) -> None:
    with pytest.raises(ValueError, match='plan="auto" cannot be combined with cost=.*needs correlations'):
        make_transfer(cost=cost)


def test_a_single_batch_has_no_plan_of_that_kind() -> None:
    with pytest.raises(ValueError, match=r"`plan` to be one of \[.*\], but got 'auto'"):
        transport_distance(torch.randn(3, 9), torch.randn(3, 9), plan="auto")
