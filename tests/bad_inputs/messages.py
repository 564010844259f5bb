"""What was said, in errors and warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from expected_warnings import EXPECTED_WARNINGS


def assert_message(found: BaseException | str, words: tuple[str, ...]) -> None:
    """All words are in the message."""
    missing = [word for word in words if word not in str(found)]
    assert not missing, f"{missing} missing in: {found}"


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """The warnings inside the block, but for those that are expected of other packages; complete after it."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for line, _ in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=line.removeprefix("ignore:"))
        yield messages
    messages += [str(warning.message) for warning in found]
