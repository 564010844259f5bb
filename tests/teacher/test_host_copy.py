"""A copy of what a tensor held when it was begun."""

from __future__ import annotations

import torch

from lightning_otrt.teacher.host_copy import HostCopy


def test_later_writes_do_not_reach_it() -> None:
    tensor = torch.ones(3)
    copied = HostCopy(tensor)
    tensor.zero_()
    assert torch.equal(copied.wait(), torch.ones(3))
