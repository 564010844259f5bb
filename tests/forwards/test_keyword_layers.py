"""Layers that get their tensor by keyword are read, and looked at, like those that get it by position."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer, compare_representations


class Block(nn.Module):
    """A layer of its own type, which tells no axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Net(nn.Module):
    """The block ``b`` gets what a function makes of the embedded inputs, by keyword or by position."""

    def __init__(self, embed: nn.Module, change: Callable[[Tensor], Tensor], width: int, *, by_keyword: bool) -> None:
        super().__init__()
        self.embed, self.b, self.head = embed, Block(width), nn.Linear(width, 3)
        self.change, self.by_keyword = change, by_keyword

    def forward(self, x: Tensor) -> Tensor:
        x = self.change(self.embed(x))
        return self.head(self.b(x=x) if self.by_keyword else self.b(x))


ORDER = torch.randperm(16, generator=torch.Generator().manual_seed(0))


def tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).mT


#: The embedding, what both networks do behind it, the inputs, and what is told.
CASES: dict[str, tuple[Callable[[int], nn.Module], tuple[Callable[[Tensor], Tensor], ...], Tensor, str]] = {
    "features": (lambda width: nn.Linear(5, width), (torch.tanh, torch.tanh), torch.randn(8, 5), ""),
    "as many times as samples, first": (
        lambda width: nn.Embedding(30, width),
        (lambda x: x.transpose(0, 1).cumsum(0), lambda x: x.transpose(0, 1).cumsum(0)),
        torch.randint(30, (8, 8)),
        "",
    ),
    "patches in order": (lambda width: nn.Conv2d(3, width, 2, 2), (tokens, tokens), torch.randn(8, 3, 8, 8), ""),
    "patches in another order": (
        lambda width: nn.Conv2d(3, width, 2, 2),
        (lambda maps: tokens(maps)[:, ORDER], lambda maps: tokens(maps)[:, ORDER]),
        torch.randn(8, 3, 8, 8),
        "does not show that they lie row by row",
    ),
    "views in another order": (
        lambda width: nn.Linear(5, width),
        (lambda x: x.flatten(0, 1), lambda x: x.transpose(0, 1).flatten(0, 1)),
        torch.randn(8, 3, 5),
        "student and teacher hold them in another order",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_input_by_keyword_is_that_by_position(case: str) -> None:
    embed, changes, inputs, said = CASES[case]

    def found(*, by_keyword: bool) -> tuple[float, list[str]]:
        torch.manual_seed(0)
        student, teacher = (
            Net(embed(width), change, width, by_keyword=by_keyword)
            for change, width in zip(changes, (6, 8), strict=True)
        )
        transfer = RepresentationTransfer(teacher, {"b:input": "b:input"}, plan="uniform", weight=1.0)
        with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
            warnings.simplefilter("always")
            student(inputs)
            value = float(transfer.loss().detach())
        return value, [str(warning.message) for warning in caught]

    value, messages = found(by_keyword=True)
    assert (value, messages) == found(by_keyword=False)
    assert bool(messages) == bool(said)
    assert not said or any(said in message for message in messages)


def test_comparisons() -> None:
    nets = [Net(nn.Linear(5, width), torch.tanh, width, by_keyword=True) for width in (6, 8)]
    result = compare_representations(*nets, [(torch.randn(16, 5),)], layers=["b:input"], progress=False)
    assert result.distances.isfinite().all()
