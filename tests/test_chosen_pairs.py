"""Which pairs of layers a run goes on with, where the choice depends on the batch: saved ones, those of process 0."""

from __future__ import annotations

import io
import os
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from helpers import make_trainer, seeded
from processes import run_processes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_otrt import OTRTCallback, RepresentationTransfer, suggest_weight


def block(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, 4, 3, padding=1, bias=False)


class Teacher(nn.Module):
    """One block sees the first channel, one the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = seeded(1, block, 1), seeded(2, block, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.first(x[:, :1]), self.second(x[:, 1:])], 1).mean((2, 3)))


class Student(nn.Module):
    """Its block gives the sum of both blocks of the teacher, so that the louder channel tells which one is closer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = block(2)
        teacher = Teacher()
        self.block.weight.data = torch.cat([teacher.first.weight, teacher.second.weight], 1).detach()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean((2, 3)))


class Task(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = seeded(3, Student)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loud(channel: int, seed: int = 0) -> Tensor:
    x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
    x[:, channel] *= 20
    return x


def step(transfer: RepresentationTransfer, student: nn.Module, x: Tensor) -> float:
    student(x)
    return float(transfer.loss().detach())


def make_transfer(**options: Any) -> RepresentationTransfer:
    return RepresentationTransfer(seeded(4, Teacher), "matched", **options)


def chosen(transfer: RepresentationTransfer) -> list[str]:
    return [pair.teacher for pair in transfer.pairs]


@pytest.mark.parametrize(("channel", "name"), [(0, "first"), (1, "second")])
def test_the_choice_depends_on_the_batch(channel, name):
    student, transfer = Student(), make_transfer()
    with transfer.attached(student):
        step(transfer, student, loud(channel))
    assert chosen(transfer) == [name]


def test_pairs_stay_until_a_reset():
    student, transfer = Student(), make_transfer()
    for x in (loud(0), loud(1)):
        with transfer.attached(student):
            step(transfer, student, x)
        assert chosen(transfer) == ["first"]
    transfer.reset()
    with transfer.attached(student):
        step(transfer, student, loud(1))
    assert chosen(transfer) == ["second"]


def test_a_resumed_run_takes_the_saved_pairs():
    student, transfer = Student(), make_transfer(memory=0.9)
    with transfer.attached(student):
        step(transfer, student, loud(0))
        file = io.BytesIO()
        torch.save(transfer.state_dict(), file)
        expected = step(transfer, student, loud(1))
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = make_transfer(memory=0.9)
    resumed.load_state_dict(state)
    assert resumed.state_dict()["pairs"] == state["pairs"], "saved again before the first forward"
    with resumed.attached(student):
        assert step(resumed, student, loud(1)) == expected
    assert resumed.pairs == transfer.pairs
    # Into one that has run, and chose otherwise: while it is attached, and not.
    other = make_transfer(memory=0.9)
    with other.attached(student):
        step(other, student, loud(1))
        assert chosen(other) == ["second"]
        other.load_state_dict(state)
        assert step(other, student, loud(1)) == expected
    assert chosen(other) == ["first"]


class Convolutions(nn.Module):
    """Two blocks under names of its own, of which the second may be left out."""

    def __init__(self, name: str, width: int = 4) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU()) for channels in (2, width))
        self.name, self.depth, self.head = name, 2, nn.Linear(width, 3)
        self.add_module(name, nn.ModuleList(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.get_submodule(self.name).children())[: self.depth]:
            x = layer(x)
        return self.head(x.mean((2, 3)))


def test_pairs_whose_layers_run_no_more_are_named():
    student, transfer = Convolutions("net"), RepresentationTransfer(Convolutions("net", 6), "blocks")
    with transfer.attached(student):
        step(transfer, student, loud(0))
    student.depth = 1
    message = r"Student layer 'net.1'.* did not run .* comes from an earlier fit, or from a checkpoint\. `reset\(\)`"
    with pytest.raises(ValueError, match=message), transfer.attached(student):
        student(loud(0))
    transfer.reset()
    with transfer.attached(student):
        step(transfer, student, loud(0))
    assert [pair.student for pair in transfer.pairs] == ["net.0"]


def test_a_resumed_run_with_a_teacher_of_other_names_says_what_differs():
    student, transfer = Convolutions("net"), RepresentationTransfer(Convolutions("net", 6), "blocks")
    with transfer.attached(student):
        step(transfer, student, loud(0))
    resumed = RepresentationTransfer(Convolutions("body", 6), "blocks")
    resumed.load_state_dict(transfer.state_dict())
    with pytest.raises(ValueError, match=r"was saved with the layer pairs .*'body\.1'"), resumed.attached(student):
        student(loud(0))


def test_saved_pairs_do_not_overrule_the_user():
    student, transfer = Student(), make_transfer()
    with transfer.attached(student):
        step(transfer, student, loud(0))
    other = RepresentationTransfer(Teacher(), {"block": "second"})
    other.load_state_dict(transfer.state_dict())
    with other.attached(student), pytest.raises(ValueError, match="saved with the layer pairs"):
        student(loud(0))
    with (resolved := RepresentationTransfer(Teacher(), {"block": "second"})).attached(student):
        step(resolved, student, loud(0))
        with pytest.raises(ValueError, match="saved with the layer pairs"):
            resolved.load_state_dict(transfer.state_dict())


def test_a_question_in_between_does_not_change_the_pairs():
    student, transfer = Student(), make_transfer()
    with transfer.attached(student):
        step(transfer, student, loud(0))
    data = [(loud(1), torch.zeros(8, dtype=torch.long))]
    suggest_weight(student, transfer, data, loss_fn=F.cross_entropy)
    with transfer.attached(student):
        step(transfer, student, loud(1))
    assert chosen(transfer) == ["first"]
    assert transfer.engine.calls == 2


def test_a_trainer_resumes_with_the_saved_pairs(tmp_path):
    path = tmp_path / "last.ckpt"
    callback = OTRTCallback(seeded(4, Teacher), "matched")
    data = [DataLoader(TensorDataset(loud(channel), torch.zeros(8, dtype=torch.long)), 4) for channel in (0, 1)]
    trainer = make_trainer(callbacks=[callback], max_steps=2)
    trainer.fit(Task(), data[0])
    trainer.save_checkpoint(path)
    assert chosen(callback.transfer) == ["first"]
    resumed = OTRTCallback(seeded(4, Teacher), "matched")
    make_trainer(callbacks=[resumed], max_epochs=2).fit(Task(), data[1], ckpt_path=path, weights_only=True)
    assert resumed.transfer.engine.calls == 4
    assert chosen(resumed.transfer) == ["first"]


def on_two(rank_0: int = 0) -> dict[str, Any]:
    rank = dist.get_rank()

    def attempt(x: Tensor, **options: Any) -> Any:
        student, transfer = Student(), make_transfer(**options)
        try:
            with transfer.attached(student):
                step(transfer, student, x)
        except (ValueError, RuntimeError) as error:
            return str(error)
        return chosen(transfer)

    x = loud(rank if rank_0 == 0 else 1 - rank)
    return {
        "together": attempt(x),
        "alone": attempt(x, global_batch=False),
        "broken": attempt(x if rank == 0 else x[:, :1]),
    }


def test_process_0_chooses_for_all():
    found = run_processes(2, on_two)
    assert [each["together"] for each in found] == [["first"], ["first"]]
    assert [each["alone"] for each in found] == [["first"], ["second"]]
    assert "Process 1 of 2 could not choose the layers of the transfer. RuntimeError" in found[0]["broken"]
    assert "Process" not in found[1]["broken"]
    assert run_processes(2, on_two, 1)[1]["together"] == ["second"]


def in_a_trainer(path: str) -> list[Any]:
    """Pairs and term of a fit, and of one that resumes it with other data, with one term for all and one for each."""

    def data(channel: int) -> DataLoader[Any]:
        return DataLoader(TensorDataset(loud(channel), torch.zeros(8, dtype=torch.long)), 8)

    found = []
    common: dict[str, Any] = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    for global_batch in (None, False):
        callback = OTRTCallback(seeded(4, Teacher), "matched", global_batch=global_batch)
        trainer = make_trainer(callbacks=[callback], max_steps=1, **common)
        trainer.fit(Task(), data(int(os.environ["RANK"])))
        found.append((chosen(callback.transfer), float(trainer.callback_metrics["train/otrt"])))
        trainer.save_checkpoint(f"{path}/{global_batch}.ckpt")
        resumed = OTRTCallback(seeded(4, Teacher), "matched", global_batch=global_batch)
        trainer = make_trainer(callbacks=[resumed], max_epochs=2, **common)
        trainer.fit(Task(), data(1), ckpt_path=f"{path}/{global_batch}.ckpt", weights_only=True)
        found.append((chosen(resumed.transfer), 0.0))
    return found


def test_process_0_chooses_for_all_of_a_trainer(tmp_path):
    found = run_processes(2, in_a_trainer, str(tmp_path), init=False, timeout=120)
    assert [names for names, _ in found[0]] == [["first"]] * 4
    assert [names for names, _ in found[1]] == [["first"]] * 4
    assert found[0][0][1] == found[1][0][1]
