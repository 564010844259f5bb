"""A state that does not fit is refused before anything of the run is lost; a new run forgets what it has told."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import LAYERS, Net, loader, make_task, make_teacher, make_trainer
from trainer.fits import make_callback

from lightning_otrt import RepresentationTransfer

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
