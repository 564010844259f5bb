"""Warnings that are given once, and errors that are warnings where a user wants no error."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import make_trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader

from lightning_otrt import OTRTCallback, RepresentationTransfer, TransferWarning
from lightning_otrt.notices import Notices, rank_zero_warn, warn


def told(tell: Callable[[], None]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tell()
    return caught


def test_each_warning_is_given_once():
    notices = Notices()
    messages = ["one", "two", "one"]
    assert [str(each.message) for each in told(lambda: [notices.warn(text) for text in messages])] == ["one", "two"]


def test_one_key_is_one_warning():
    notices = Notices()
    assert len(told(lambda: [notices.warn(text, key="few") for text in ("3 are few", "4 are few")])) == 1


def test_an_error_or_once_a_warning():
    with pytest.raises(KeyError, match="missing"):
        Notices().fail(KeyError("missing"), otherwise="left out")
    notices = Notices(strict=False)
    found = told(lambda: [notices.fail(KeyError("missing"), otherwise="left out") for _ in range(2)])
    assert [str(each.message) for each in found] == ["left out"]
    assert not told(lambda: notices.warn("left out")), "it is the same warning"


def line_of(function: Callable[..., object], text: str) -> int:
    """The number of the line of a function that holds a text."""
    lines, first = inspect.getsourcelines(function)
    return next(first + index for index, line in enumerate(lines) if text in line)


def test_a_warning_points_at_the_line_of_the_user():
    """Frames of this package, of torch and of contextlib lie between the two, and more of them in deeper networks."""
    student, teacher = (nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU())) for _ in range(2))
    transfer = RepresentationTransfer(teacher, layers=["0.1"])

    def run() -> None:
        with transfer.recording():
            student(torch.ones(4, 4))
            transfer.loss()

    with transfer.attached(student):
        found = told(run)
    lines, first = inspect.getsourcelines(run)
    assert found
    assert {each.filename for each in found} == {__file__}
    assert {each.lineno for each in found} <= set(range(first + 1, first + len(lines)))


def test_a_trainer_does_not_hide_the_line_of_the_user():
    callback = OTRTCallback(BoringModel(), layers={"layer": "layer"})
    trainer = make_trainer(max_steps=1, callbacks=[callback])

    def run() -> None:
        trainer.fit(BoringModel(), DataLoader(torch.ones(4, 32), batch_size=4))

    found = [each for each in told(run) if "dead" in str(each.message)]
    assert len(found) == 2
    assert {each.filename for each in found} == {__file__}


@pytest.mark.parametrize("give", [warn, rank_zero_warn])
def test_a_filter_names_the_category(give: Callable[[str], None]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", TransferWarning)
        with pytest.raises(TransferWarning, match="one"):
            give("one")


def test_the_first_process_warns_alone(monkeypatch: pytest.MonkeyPatch):
    assert [each.filename for each in told(lambda: rank_zero_warn("one"))] == [__file__]
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert not told(lambda: rank_zero_warn("one"))


def test_all_warnings_of_the_package_have_its_category():
    """None is given in another way."""
    package = Path(inspect.getfile(OTRTCallback)).parents[1]
    calls = {path.name for path in package.rglob("*.py") if re.search(r"warnings\.warn\(", path.read_text())}
    assert calls == {"notices.py"}
    assert not [
        path
        for path in package.rglob("*.py")
        if re.search(r"import .*rank_zero_warn", path.read_text())
        and "lightning_otrt.notices import" not in path.read_text()
    ]


def test_copies_have_told_the_same():
    notices = Notices()
    told(lambda: notices.warn("one"))
    for copied in (copy.deepcopy(notices), pickle.loads(pickle.dumps(notices))):
        assert not told(lambda copied=copied: copied.warn("one"))
        assert len(told(lambda copied=copied: copied.warn("two"))) == 1
    assert len(told(lambda: notices.warn("two"))) == 1
