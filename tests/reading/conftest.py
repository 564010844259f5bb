"""The student and the input that the tests of the recorder and of its hooks share."""

from __future__ import annotations

import pytest
import torch
from reading.recorded import Net
from torch import Tensor


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3)
