"""Fixtures of the tests of teachers."""

from __future__ import annotations

import pytest
import torch
from teacher.networks import Net


@pytest.fixture
def net() -> Net:
    """A teacher in mixed modes with mixed ``requires_grad``."""
    torch.manual_seed(0)
    net = Net()
    net.body[1].eval()
    net.head.eval()
    net.head.weight.requires_grad_(False)
    net.body[1](torch.randn(8, 3))
    return net
