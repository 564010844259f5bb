"""Warnings that are given once, and errors that are warnings where a user wants no error."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest

from lightning_otrt.notices import Notices


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


def test_a_warning_names_the_caller_of_the_function_that_gives_it():
    notices = Notices(strict=False)

    def loss(index: int) -> None:
        notices.warn(f"{index}")
        notices.fail(ValueError(), otherwise=f"{index} is left out")

    found = told(lambda: loss(0))
    assert {each.filename for each in found} == {__file__}
    assert {each.lineno for each in found} == {found[0].lineno}


def test_copies_have_told_the_same():
    notices = Notices()
    told(lambda: notices.warn("one"))
    for copied in (copy.deepcopy(notices), pickle.loads(pickle.dumps(notices))):
        assert not told(lambda copied=copied: copied.warn("one"))
        assert len(told(lambda copied=copied: copied.warn("two"))) == 1
    assert len(told(lambda: notices.warn("two"))) == 1
