"""What is used of torch's private parts still does what it is used for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from old_versions import needs_freed_graphs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_otrt.reading.torch_internals import (
    all_buffers,
    child_of,
    has_freed_graph,
    is_compiled,
    is_in_backward,
    is_in_functional_transform,
    module_tables,
    unwrapped,
    version_of,
    without_earlier_pre_hooks,
)


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


def test_is_in_functional_transform() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(is_in_functional_transform())
        return x.sum()

    function(torch.ones(2))
    torch.func.grad(function)(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2, 2))
    function(torch.ones(2))
    assert seen == [False, True, True, False]


def test_version_of() -> None:
    x = torch.zeros(2)
    before = version_of(x)
    _ = x + 1
    assert version_of(x) == before
    x.add_(1)
    x.view(1, 2).mul_(2)
    assert version_of(x) == before + 2
    x.data.zero_()
    assert version_of(x) == before + 2
    with torch.inference_mode():
        assert version_of(torch.zeros(2).add_(1)) == 0


def test_unwrapped() -> None:
    net = nn.Linear(2, 2)
    assert unwrapped(torch.compile(net, backend="eager")) is net
    assert unwrapped(net) is net


def test_child_of() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    assert child_of(net, "0") is net[0]
    assert child_of(net, "1") is None


def test_without_earlier_pre_hooks() -> None:
    class Marker:
        def __call__(self, module: nn.Module, args: Any) -> None:
            seen.append("marker")

    seen: list[str] = []
    module = nn.Identity()
    module.register_forward_pre_hook(lambda module, args: seen.append("earlier"))
    with without_earlier_pre_hooks(module, Marker):  # there is none
        module(1)
    module.register_forward_pre_hook(Marker())
    module.register_forward_pre_hook(lambda module, args: seen.append("later"))
    with without_earlier_pre_hooks(module, Marker):
        module(1)
    module(1)
    assert seen == ["earlier", "marker", "later", "earlier", "marker", "later"]


def test_without_earlier_pre_hooks_and_the_hooks_that_end_what_they_begin() -> None:
    class Marker:
        def __call__(self, module: nn.Module, args: Any) -> None:
            seen.append("marker")

    class Gathering:
        """As FSDP, which frees after a forward what it gathers before it."""

        def begin(self, module: nn.Module, args: Any) -> None:
            seen.append("begin")

        def end(self, module: nn.Module, args: Any, output: Any) -> None:
            seen.append("end")

    seen: list[str] = []
    module, gathering = nn.Identity(), Gathering()
    module.register_forward_hook(lambda module, args, output: seen.append("first"))
    module.register_forward_pre_hook(gathering.begin)
    module.register_forward_hook(gathering.end)
    module.register_forward_pre_hook(Marker())
    last = module.register_forward_hook(lambda module, args, output: seen.append("last"))
    with without_earlier_pre_hooks(module, Marker):
        module(1)
        last.remove()
        module.register_forward_hook(lambda module, args, output: seen.append("new"))
    assert seen == ["marker", "first", "last"]
    seen.clear()
    module(1)
    assert seen == ["begin", "marker", "first", "end", "new"]


def test_without_earlier_pre_hooks_and_with_the_outputs_that_a_module_changes() -> None:
    class Marker:
        def __call__(self, module: nn.Module, args: Any) -> None: ...

    class Around(nn.Module):
        def before(self, module: nn.Module, args: Any) -> tuple[int]:
            return (args[0] + 1,)

        def after(self, module: nn.Module, args: Any, output: int) -> int:
            return 10 * output

    module, around = nn.Identity(), Around()
    module.register_forward_pre_hook(around.before)
    module.register_forward_hook(around.after)
    module.register_forward_pre_hook(Marker())
    with without_earlier_pre_hooks(module, Marker):
        assert module(1) == 10
    assert module(1) == 20


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


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (2 * grad).view_as(*ctx.saved_tensors)


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
GRAPHS: dict[str, Callable[[Tensor], Tensor]] = {
    "a linear layer": nn.Linear(8, 4),
    "a convolution with BatchNorm": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU()),
    "a normalisation without weights": nn.Sequential(nn.BatchNorm2d(3, affine=False, track_running_stats=False)),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x, x, x),
    "a custom function": Doubled.apply,
    "a list": lambda x: torch.stack([x.exp(), x.sin()]),
    "an index": lambda x: x.exp()[torch.tensor([0, 1])],
    "checkpointing": lambda x: checkpoint(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), x, use_reentrant=False),
    "compiled code": torch.compile(nn.Sequential(nn.Linear(8, 8), nn.GELU()), backend="aot_eager"),
}


@needs_freed_graphs
@pytest.mark.parametrize("name", GRAPHS)
def test_has_freed_graph(name: str) -> None:
    x = X.clone().requires_grad_()
    y = GRAPHS[name](x)
    # A reading of the layer, which the first backward pass does not go through.
    reading = y.mean(-1).square()
    assert not has_freed_graph([reading])
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert not has_freed_graph([reading])
    y.sum().backward()
    assert has_freed_graph([torch.ones(2), reading])
    with pytest.raises(RuntimeError, match="second time"):
        reading.sum().backward()
    torch.compiler.reset()


def test_looking_for_a_freed_graph_runs_nothing_again() -> None:
    seen = []

    def layer(x: Tensor) -> Tensor:
        seen.append(x)
        return x.exp().sin()

    y = checkpoint(layer, X.clone().requires_grad_(), use_reentrant=False)
    assert not has_freed_graph([y * y])
    assert len(seen) == 1


def test_a_tensor_without_a_graph_has_none_that_is_freed() -> None:
    assert not has_freed_graph([torch.ones(1), torch.ones(1, requires_grad=True)])


def test_module_tables() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    before = [dict(table) for table in module_tables(net)]
    net.scale = 2.0
    net.append(nn.ReLU())
    net.register_forward_pre_hook(lambda module, args: None)
    net.register_forward_hook(lambda module, args, output: None)
    assert [len(table) - len(old) for table, old in zip(module_tables(net), before, strict=True)] == [1, 1, 1, 1]
