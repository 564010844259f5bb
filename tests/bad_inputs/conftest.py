"""Forgets the fits of a test after it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bad_inputs.fits import KEPT


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    KEPT.clear()
