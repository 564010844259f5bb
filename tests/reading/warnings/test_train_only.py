"""What the first layer gets in evaluation and in training: inputs of kinds whose values are compared, or cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt.reading.warnings.train_only import FirstInput


class Changes(nn.Module):
    """Changes its input in training, before the first layer."""

    def __init__(self, in_training: Callable[[Tensor], Tensor], first: nn.Module | None = None) -> None:
        super().__init__()
        self.in_training, self.first = in_training, first or nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.in_training(x) if self.training else x)


class Product(nn.Module):
    """A layer of sparse rows, as of a bag of words."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Mapped(nn.Module):
    """A layer that runs for each row by itself, inside a transform."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(self.layer)(x)


def is_warned(net: nn.Module, x: Tensor) -> bool:
    first = FirstInput()
    with torch.no_grad(), first.noted(net, ""):
        net.eval()(x)
    first.compare_next()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net.train()(x)
    assert not any(module._forward_pre_hooks for module in net.modules())
    return any("changes its inputs in training" in str(warning.message) for warning in caught)


def rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1024, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)


def dropped(x: Tensor, share: float) -> Tensor:
    """Dropout, whose factor is rounded with the values."""
    kept = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) >= share
    return torch.where(kept, x / (1 - share), torch.zeros_like(x))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.98])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_factor_is_rounded_with_the_values(share: float, dtype: torch.dtype) -> None:
    x = rows(dtype)
    assert not is_warned(Changes(lambda x: dropped(x, share), nn.Linear(4, 3, dtype=dtype)), x)
    assert is_warned(Changes(lambda x: dropped(x, share).roll(1, 0), nn.Linear(4, 3, dtype=dtype)), x)


@pytest.mark.parametrize("change", [torch.zeros_like, lambda x: 0 * x + 3])
def test_inputs_that_are_replaced_by_a_constant(change: Callable[[Tensor], Tensor]) -> None:
    """Where all is dropped nothing tells other samples."""
    assert is_warned(Changes(change), rows()) == (change is not torch.zeros_like)


def test_values_in_place_of_zeros() -> None:
    assert is_warned(Changes(lambda x: x + 1), torch.zeros(6, 4))


def test_an_empty_input_is_the_same() -> None:
    assert not is_warned(Changes(lambda x: x.clone()), torch.zeros(0, 4))


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.to_dense()])
def test_sparse_inputs_are_not_compared(change: Callable[[Tensor], Tensor]) -> None:
    assert not is_warned(Changes(change, Product()), rows().relu().to_sparse())


def test_inputs_that_are_sparse_in_training_alone_are_not_compared() -> None:
    assert not is_warned(Changes(lambda x: x.to_sparse(), Product()), rows().relu())


def test_values_inside_of_a_transform_are_not_compared() -> None:
    assert not is_warned(Mapped(), rows())


def test_an_earlier_forward_is_forgotten() -> None:
    """The layers may be chosen again, on another batch, before the first one runs in training."""
    net, first = Changes(lambda x: x.flip(0)), FirstInput()
    for batch in (rows(), rows().flip(1)):
        with torch.no_grad(), first.noted(net, ""), warnings.catch_warnings():
            warnings.simplefilter("error")
            net.eval()(batch)
        first.compare_next()
    assert len(net.first._forward_pre_hooks) == 1
    first.forget()
    assert not net.first._forward_pre_hooks
