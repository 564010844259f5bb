"""Traces of the networks in ``layers/networks.py``."""

from __future__ import annotations

import pytest
import torch
from layers.networks import Net, Odd, Task

from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.tracer import trace


@pytest.fixture(scope="session")
def student() -> Trace:
    return trace(Task(), (torch.randn(2, 3, 16, 16),), root="net")


@pytest.fixture(scope="session")
def teacher() -> Trace:
    return trace(Net(8), (torch.randn(2, 3, 16, 16),))


@pytest.fixture(scope="session")
def odd() -> Trace:
    return trace(Odd(), (torch.randn(4, 6),))
