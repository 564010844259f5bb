"""Fixtures of the tests in a Trainer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled code of other tests, and none left for them."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
