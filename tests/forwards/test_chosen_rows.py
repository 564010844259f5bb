"""Rows that a network chooses for itself, layers inside transforms of the network, and the reasons of "auto"."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, stack_module_state, vmap

from lightning_otrt import RepresentationTransfer

#: The first use of forward mode in a process compiles decompositions of torch.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")

ROWS = "have a number of rows that is neither that of the samples nor that of all their positions"


class Mixture(nn.Module):
    """Two experts, each of which takes the tokens that it scores highest, or all."""

    def __init__(self, width: int, capacity: int | None) -> None:
        super().__init__()
        self.embed, self.router = nn.Linear(5, width), nn.Linear(width, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(2))
        self.mixed, self.head, self.capacity = nn.Linear(width, width), nn.Linear(width, 3), capacity

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        tokens = x.flatten(0, 1)
        scores, mixed = self.router(tokens).softmax(-1), torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            chosen = scores[:, number].topk(self.capacity or len(tokens)).indices
            mixed = mixed.index_add(0, chosen, expert(tokens[chosen]) * scores[chosen, number, None])
        return self.head(self.mixed(mixed.view_as(x)).mean(1))


class Listed(nn.Module):
    """Two branches on rows that are some of the tokens, in some order."""

    def __init__(self, width: int, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head, self.rows = nn.Linear(5, width), nn.Linear(width, 3), rows
        self.members = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.experts = nn.ModuleDict({str(number): nn.Linear(width, width) for number in range(2)})

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows(self.embed(x))
        rows = rows.flatten(0, -2)
        for branch in (*self.members, *self.experts.values()):
            rows = rows + branch(rows)
        return self.head(rows)


def run(student: nn.Module, teacher: nn.Module, layers: object, x: Tensor) -> str:
    told: list[str] = []
    transfer = RepresentationTransfer(teacher, layers)
    transfer.report = told.append
    with transfer.attached(student):
        student(x)
        transfer.loss()
    return told[0]


@pytest.mark.parametrize("layer", ["experts.0", "experts.1.0", "experts.0.0:input"])
@pytest.mark.parametrize("capacity", [40, 20, 33])
def test_experts_are_warned_of(layer, capacity):
    with pytest.warns(UserWarning, match=ROWS) as caught:
        run(Mixture(6, capacity), Mixture(9, capacity), [layer], torch.randn(8, 10, 5))
    assert {str(warning.message).split(" layers")[0] for warning in caught} == {"The student", "The teacher"}


def by_score(tokens: Tensor) -> Tensor:
    """The eight tokens of a batch of eight that score highest."""
    tokens = tokens.flatten(0, 1)
    return tokens[tokens[:, 0].topk(8).indices]


def above(tokens: Tensor) -> Tensor:
    """The highest token of each sample, the samples in the order of its score."""
    best = tokens.gather(1, tokens[..., :1].argmax(1, keepdim=True).expand(-1, -1, tokens.shape[2]))[:, 0]
    return best[best[:, 0].argsort()]


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        *((lambda width, rows=rows: Listed(width, rows), "members.0") for rows in (by_score, above)),
        (lambda width: Listed(width, by_score), "experts.1:input"),
        *((lambda width, count=count: Mixture(width, count), "experts.1") for count in (8, 80)),
        (lambda width: Mixture(width, None), "experts.0.0"),
    ],
)
def test_as_many_rows_as_samples_or_tokens_by_chance_are_warned_of(make, layer):
    with pytest.warns(UserWarning, match="rows that do not follow the samples") as caught:
        run(make(6), make(9), [layer], torch.randn(8, 10, 5))
    assert {str(warning.message).split(" layers")[0] for warning in caught} == {"The student", "The teacher"}


class Windows(nn.Module):
    """Tokens of each window as samples, then one vector of each window."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.inner, self.pooled = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.inner(self.embed(x).reshape(len(x) * 5, 2, -1))
        return self.head(self.pooled(windows.mean(1)).reshape(len(x), 5, -1).mean(1))


class Flattened(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.each, self.head = nn.Conv2d(3, width, 3, 2, 1), nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        rows = self.each(maps.movedim(1, -1).flatten(0, 2))
        return self.head(rows.reshape(len(x), -1, maps.shape[1]).mean(1))


class Views(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, width, 3, 2, 1), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(torch.cat([x, x.flip(3)])).mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "layer", "shape"),
    [
        (lambda width: Mixture(width, None), "mixed", (8, 10, 5)),
        (lambda width: Listed(width, lambda x: x), "members.0", (8, 10, 5)),
        (lambda width: Listed(width, lambda x: x.transpose(0, 1)), "members.1", (8, 10, 5)),
        (lambda width: Listed(width, lambda x: x[:, 0]), "members.0", (8, 10, 5)),
        (lambda width: Listed(width, lambda x: x.mean(1)), "experts.1:input", (8, 10, 5)),
        (Windows, "pooled", (8, 10, 5)),
        (Flattened, "each", (4, 3, 16, 16)),
        (Views, "head:input", (4, 3, 16, 16)),
        (lambda width: nn.Sequential(nn.Linear(5, width), nn.Linear(width, 2)), "0", (8, 5)),
    ],
)
def test_rows_of_samples_and_positions_are_not(make, layer, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(make(6), make(9), [layer], torch.randn(shape))


class Ensemble(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, width), nn.ReLU())
        self.members = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights, buffers = stack_module_state(list(self.members))
        x = self.stem(x)
        run_one = vmap(lambda w, b: functional_call(self.members[0], (w, b), (x,)))
        return self.head(run_one(weights, buffers).mean(0).relu())


class Derived(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.Tanh())
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, dy = jvp(self.body, (x,), (torch.ones_like(x),))
        return self.head(y + dy)


@pytest.mark.parametrize(
    ("make", "layer"),
    [(Ensemble, "members.0"), (Ensemble, "members.0:input"), (Derived, "body"), (Derived, "body.0")],
)
def test_a_layer_inside_a_transform_is_an_error_that_names_it(make, layer):
    name = layer.removesuffix(":input")
    with pytest.raises(ValueError, match=f"Student layer '{name}' .* runs inside a transform of torch.func"):
        run(make(5), make(8), [layer], torch.randn(16, 6))


@pytest.mark.parametrize("make", [Ensemble, Derived])
@pytest.mark.parametrize("layers", ["auto", "head:input"])
def test_the_layers_outside_of_it_are_recorded(make, layers):
    run(make(5), make(8), layers, torch.randn(16, 6))


class Shared(nn.Module):
    """One block for all depths, and logits for each position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 30)
        self.block = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(3):
            x = self.block(x)
        return self.head(x)


def points(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


@pytest.mark.parametrize(("make", "such_as"), [(points, "'0'"), (Shared, "'embed'")])
def test_an_error_of_the_fallback_gives_its_reason(make, such_as):
    with pytest.raises(ValueError, match=f'so "auto" uses "penultimate".*{such_as}.*No classification head'):
        run(make(6), make(9), "auto", torch.randn(6, 10, 8))
