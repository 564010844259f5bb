"""A state that does not fit is refused before anything of the run is lost; a new run forgets what it has told."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYERS, Net, hooks, loader, make_task, make_teacher, make_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from trainer.fits import make_callback

from lightning_otrt import LayerPair, RepresentationTransfer
from lightning_otrt.reading.student_root.search import RootSearch
from lightning_otrt.teacher.cache.cached_run import CachedRun

X = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def after_a_call(layers: Any, teacher: Net, student: Net) -> RepresentationTransfer:
    transfer = RepresentationTransfer(teacher, layers, memory=0.9)
    transfer.attach(student)
    with transfer.recording():
        student(X)
        transfer.loss()
    return transfer


@pytest.mark.parametrize("what", ["layers", "teacher"])
def test_a_load_that_fails_leaves_the_run_as_it_is(what):
    student, teacher = Net(), make_teacher()
    mine = after_a_call({"block1": "block1"}, teacher, student)
    other = after_a_call(
        {"block2": "block1"} if what == "layers" else {"block1": "block1"},
        make_teacher() if what == "layers" else Net(6),
        Net(),
    )
    before = [part.clone() for part in mine.state_dict()["engine"]["pairs"][0]["sums"]]
    with pytest.raises(ValueError, match="layer pairs" if what == "layers" else "another teacher"):
        mine.load_state_dict(other.state_dict())
    assert mine.engine.calls == 1
    assert mine.step == 1
    after = mine.state_dict()["engine"]["pairs"][0]["sums"]
    assert all(map(torch.equal, after, before))
    with mine.recording():
        student(X)
        assert mine.loss().isfinite()
    mine.detach()
    other.detach()


def test_a_new_run_tells_again_what_is_wrong():
    transfer = RepresentationTransfer(make_teacher(), {"block1": "block1"}, strict=False)
    student = Net().requires_grad_(False)
    counts = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with transfer.attached(student):
                student(X)
                transfer.loss()
        counts.append(len([each for each in caught if "strict=False" in str(each.message)]))
        transfer.reset()
    assert counts[0] == counts[1] > 0


def test_flags_are_read_as_often_as_a_user_says(monkeypatch):
    reads: list[int] = []
    monkeypatch.setattr(RepresentationTransfer, "check_finite", lambda self: reads.append(self.run_state.calls))
    for every, logs, expected in ((None, 2, [2, 4]), (None, 0, []), (3, 1, [3])):
        callback = make_callback(layers=LAYERS)
        callback.transfer.check_every = every
        reads.clear()
        make_trainer(callbacks=[callback], log_every_n_steps=logs).fit(make_task(), loader())
        assert reads[:-1] == expected, "the last is that of the end"


def test_numbers_of_numpy_are_saved_as_plain_ones(tmp_path: Path):
    pairs = [LayerPair("block1", "block1", weight=np.float64(0.5)), LayerPair("block2", "block2", weight=np.float32(1))]
    numbers = {"weight": np.float32(2), "memory": np.float32(0.5), "epsilon": np.float32(0.02)}
    transfer, student = RepresentationTransfer(make_teacher(), pairs, distillation=np.float64(1), **numbers), Net()
    with transfer.attached(student):
        student(next(iter(loader()))[0])
        transfer.loss()
    torch.save(transfer.state_dict(), tmp_path / "state.pt")
    transfer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for wrong in ({"epsilon": np.float32(2)}, {"memory": np.float32(1)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RepresentationTransfer(make_teacher(), pairs, **wrong)


def test_the_interval_of_a_trainer_ends_with_its_fit():
    callback = make_callback(layers=LAYERS)
    make_trainer(callbacks=[callback], log_every_n_steps=1).fit(make_task(), loader())
    assert callback.transfer.run_state.check_every == 50
    for wrong in (0, -1, True, 2.5):
        with pytest.raises((TypeError, ValueError), match="`check_every` to be a positive integer or None"):
            callback.transfer.check_every = wrong


def test_a_short_loop_says_at_its_end_that_values_were_not_finite():
    transfer, student = RepresentationTransfer(make_teacher(), "penultimate"), Net()

    def loop() -> None:
        with transfer.attached(student):
            for step in range(3):
                x = next(iter(loader()))[0]
                student(x if step != 1 else x * torch.inf)
                transfer.loss()

    assert ["1 recent values of the transfer term were NaN or infinite" in text for text in messages(loop)] == [True]


def messages(act: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(each.message) for each in caught]


def test_a_new_run_tells_again_of_small_batches():
    transfer, student = RepresentationTransfer(make_teacher(), "penultimate"), Net()

    def run() -> None:
        with transfer.attached(student):
            for x in (X, X[:1]):
                student(x)
                transfer.loss()

    first = messages(run)
    assert any("is skipped for such batches" in message for message in first)
    transfer.reset()
    assert messages(run) == first


def test_a_new_run_looks_at_the_gradient_of_its_task_again():
    """A cross-entropy says nothing of the squared error of the next run."""
    transfer = RepresentationTransfer(make_teacher(), "penultimate", distillation=1.0)

    def run(loss_of: Any) -> None:
        student = Net()
        with transfer.attached(student):
            for _ in range(3):
                (loss_of(student(X)) + transfer.loss()).backward()

    assert messages(lambda: run(lambda y: F.cross_entropy(y, torch.arange(16) % 3))) == []
    transfer.reset()
    found = messages(lambda: run(lambda y: F.mse_loss(y, X.flatten(1)[:, :3])))
    assert [message for message in found if "the task seems to train none" in message]


def test_the_distances_are_those_of_the_last_call():
    transfer, student = (
        RepresentationTransfer(make_teacher(), "penultimate", schedule=lambda step: float(step < 1)),
        Net(),
    )
    with transfer.attached(student):
        for expected in (1, 0):
            student(X)
            transfer.loss()
            assert len(transfer.distances) == expected


def test_a_state_that_the_first_forward_refuses_is_kept():
    """A checkpoint that is saved on the error has the plans of the run."""
    saved = after_a_call({"block1": "block1"}, make_teacher(), Net())
    other = RepresentationTransfer(Net(6), {"block1": "block1"}, memory=0.9)
    state = saved.state_dict()
    saved.detach()
    other.load_state_dict(state)
    for _ in range(2):
        with pytest.raises(ValueError, match="another teacher"), other.attached(student := Net()):
            student(X)
        assert other.state_dict()["engine"]["calls"] == 1


class Frames(nn.Module):
    """A layer sees the four frames of each sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(16, width), nn.Linear(4 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.flatten(0, 1)).relu().reshape(len(x), -1))


@pytest.mark.parametrize("layers", [{"inner": "inner"}, [("head:input", "head:input"), ("inner", "inner")]])
def test_rows_are_no_samples(layers):
    """`memory="auto"` compares samples with neurons: 16 samples are too few for 40, and 64 rows are not."""
    transfer, student = RepresentationTransfer(Frames(40), layers), Frames(20)
    with transfer.attached(student):
        for rows in (16, 6):
            student(X.reshape(16, 4, 16)[:rows])
            transfer.loss()
            assert transfer.samples == rows
        assert {distance.memory for distance in transfer.distances} == {0.98}


def test_which_term_was_not_finite():
    transfer, student = (
        RepresentationTransfer(make_teacher(), {"block1": "block1"}, weight=0.0, distillation=1.0),
        Net(),
    )
    with transfer.attached(student):
        for x in (X, X * float("nan")):
            student(x)
            transfer.loss()
        with pytest.warns(UserWarning, match="1 recent values of the distillation term were NaN"):
            transfer.check_finite()


def test_an_attach_that_fails_leaves_nothing(monkeypatch):
    transfer, student = RepresentationTransfer(make_teacher(), {"block1": "block1"}), Net()
    with monkeypatch.context() as patched:
        patched.setattr(RootSearch, "start", fail)
        with pytest.raises(MemoryError), transfer.attached(student):
            pass
    assert not transfer.is_attached
    assert not hooks(student, transfer.teacher.module)
    with transfer.attached(student):
        student(X)
        assert transfer.loss() > 0


def fail(*args: Any) -> None:
    raise MemoryError


def test_a_detach_that_fails_leaves_no_hook(monkeypatch):
    """As where what the cache holds cannot be written."""
    teacher = make_teacher().train()
    transfer, student = RepresentationTransfer(teacher, {"block1": "block1"}, teacher_cache="memory"), Net()
    monkeypatch.setattr(CachedRun, "close", fail)
    transfer.attach(student)
    with transfer.recording():
        student(X)
        transfer.loss()
    with pytest.raises(MemoryError):
        transfer.detach()
    assert teacher.training
    assert not hooks(student, transfer.teacher.module)
    assert not transfer.is_attached


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_copy_of_an_attached_transfer_leaves_the_teacher_to_the_original(dtype):
    teacher = make_teacher().train()
    transfer, student = RepresentationTransfer(teacher, {"block1": "block1"}, teacher_dtype=dtype), Net()
    values = []
    with transfer.attached(student):
        for number in range(3):
            student(X)
            values.append(float(transfer.loss().detach()))
            if number == 0:
                mode = teacher.training
                copied = copy.deepcopy(transfer)
                assert not copied.is_attached
                assert teacher.training == mode
    assert min(values) > 0
    assert teacher.training
    with copied.attached(student):
        student(X)
        assert copied.loss() > 0


def test_logits_that_are_changed_in_place_are_refused():
    transfer, student = RepresentationTransfer(make_teacher(), {"block1": "block1"}, distillation=1.0), Net()
    with transfer.attached(student):
        student(X)
        transfer.teacher_output.clone().div_(2)
        transfer.loss()
        student(X)
        transfer.teacher_output.div_(2)
        with pytest.raises(RuntimeError, match="wrote to the teacher's logits in place"):
            transfer.loss()
