"""What is used of torch's private parts still does what it is used for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_otrt.reading.torch_internals import all_buffers, is_compiled, is_in_backward


def test_is_in_backward() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        seen.append(is_in_backward())
        return x.exp()

    y = checkpoint(layer, x, use_reentrant=False)
    x.register_hook(lambda gradient: seen.append(is_in_backward()))
    assert seen == [False]
    y.sum().backward()
    assert seen == [False, True, True]
    assert not is_in_backward()


def test_is_in_backward_can_be_compiled() -> None:
    compiled = torch.compile(lambda x: x + is_in_backward(), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 0
    torch.compiler.reset()


def test_all_buffers() -> None:
    module = nn.Module()
    module.register_buffer("a", torch.ones(1))
    module.register_buffer("b", None, persistent=False)
    module.inner = nn.BatchNorm1d(2)
    assert all_buffers(module) == {"a": module.a, "b": None}


def test_is_compiled() -> None:
    plain, wrapped, called = (nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3))
    wrapped[0] = torch.compile(wrapped[0], backend="eager")
    called[1].compile(backend="eager")
    assert [is_compiled(each) for each in (plain, wrapped, called)] == [False, True, True]
    assert is_compiled(torch.compile(plain, backend="eager"))
