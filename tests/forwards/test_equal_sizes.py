"""Networks whose sizes coincide: the term is that of the known axes, or something says what is not known."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer, transport_distance


class Built(nn.Module):
    """A network with a layer of known axes: ``read`` brings its output to ``(B, C, *positions)``."""

    def __init__(
        self,
        layer: nn.Module,
        read: Callable[[Tensor], Tensor],
        before: Callable[[Tensor], Tensor] = lambda x: x,
        first: nn.Module | None = None,
        select: str | int | None = None,
    ) -> None:
        super().__init__()
        self.first, self.layer = first if first is not None else nn.Identity(), layer
        self.read, self.before, self.select = read, before, select

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(self.before(self.first(x)))
        self.read_by_hand = self.read(chosen(found, self.select)).detach().clone()
        return self.read_by_hand.flatten(1)


def chosen(output: Any, select: str | int | None) -> Tensor:
    if select is not None:
        output = output[select]
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


class Inside(nn.Module):
    """A layer between two permutations of the axes."""

    def __init__(self, layer: nn.Module, before: tuple[int, ...], after: tuple[int, ...], residual: bool) -> None:
        super().__init__()
        self.inner, self.before, self.after, self.residual = layer, before, after, residual

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x.permute(self.before)).permute(self.after)
        return x + found if self.residual else found


class Returning(nn.Module):
    """A layer that gives its output among others."""

    def __init__(self, layer: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = layer, kind

    def forward(self, x: Tensor) -> Any:
        found = self.inner(x)
        return {"hidden": found, "sum": found.sum()} if self.kind == "hidden" else (found.sum(), found)


class WithClassToken(nn.Module):
    def __init__(self, patches: nn.Module, width: int) -> None:
        super().__init__()
        self.patches, self.cls_token = patches, nn.Parameter(torch.randn(1, 1, width))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        return torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)


def as_is(x: Tensor) -> Tensor:
    return x


def last(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def time_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0)


def swap(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def turn(x: Tensor) -> Tensor:
    return x.mT


Sizes = dict[str, int]

#: Networks on sequences ``(B, T, F)`` with ``C`` neurons.
SEQUENCES: dict[str, Callable[[Sizes], Built]] = {
    "linear": lambda s: Built(nn.Linear(s["F"], s["C"]), last),
    "linear, time first": lambda s: Built(nn.Linear(s["F"], s["C"]), time_first, swap),
    "conv1d": lambda s: Built(nn.Conv1d(s["F"], s["C"], 3, padding=1), as_is, turn),
    "rnn": lambda s: Built(nn.GRU(s["F"], s["C"], batch_first=True), last),
    "rnn, time first": lambda s: Built(nn.GRU(s["F"], s["C"]), time_first, swap),
    "norm": lambda s: Built(nn.LayerNorm(s["C"]), last, first=nn.Linear(s["F"], s["C"])),
    "relu": lambda s: Built(nn.ReLU(), last, first=nn.Linear(s["F"], s["C"])),
    "batch norm": lambda s: Built(nn.BatchNorm1d(s["C"]), as_is, turn, first=nn.Linear(s["F"], s["C"])),
    "group norm": lambda s: Built(nn.GroupNorm(2, s["C"]), as_is, turn, first=nn.Linear(s["F"], s["C"])),
    "conv1d inside": lambda s: Built(
        Inside(nn.Conv1d(s["F"], s["C"], 3, padding=1), (0, 2, 1), (0, 2, 1), residual=False), last
    ),
    "linear inside": lambda s: Built(Inside(nn.Linear(s["F"], s["C"]), (0, 2, 1), (0, 2, 1), False), as_is, turn),
    "residual": lambda s: Built(
        Inside(nn.Linear(s["C"], s["C"]), (0, 1, 2), (0, 1, 2), True), last, first=nn.Linear(s["F"], s["C"])
    ),
    "residual, mixing times": lambda s: Built(
        Inside(nn.Linear(s["T"], s["T"]), (0, 2, 1), (0, 2, 1), True), last, first=nn.Linear(s["F"], s["C"])
    ),
    "residual, conv1d inside": lambda s: Built(
        Inside(nn.Conv1d(s["C"], s["C"], 1), (0, 2, 1), (0, 2, 1), True), last, first=nn.Linear(s["F"], s["C"])
    ),
    "encoder": lambda s: Built(
        nn.TransformerEncoderLayer(s["C"], 2, 8, dropout=0.0, batch_first=True), last, first=nn.Linear(s["F"], s["C"])
    ),
    "encoder, time first": lambda s: Built(
        nn.TransformerEncoderLayer(s["C"], 2, 8, dropout=0.0), time_first, swap, first=nn.Linear(s["F"], s["C"])
    ),
    "dictionary": lambda s: Built(Returning(nn.Linear(s["F"], s["C"]), "hidden"), last, select="hidden"),
    "tuple": lambda s: Built(Returning(nn.Linear(s["F"], s["C"]), "tuple"), last, select=1),
}

#: Layers with rows for all positions of all samples.
ROWS: dict[str, Callable[[Sizes], Built]] = {
    "by sample": lambda s: Built(nn.Linear(s["F"], s["C"]), as_is, lambda x: x.flatten(0, 1)),
    "by sample, reshaped": lambda s: Built(nn.Linear(s["F"], s["C"]), as_is, lambda x: x.reshape(-1, x.shape[-1])),
    "by time": lambda s: Built(
        nn.Linear(s["F"], s["C"]), lambda y: y.unflatten(0, (s["T"], s["B"])).transpose(0, 1).flatten(0, 1), by_time
    ),
    "by time, normalised": lambda s: Built(
        nn.BatchNorm1d(s["C"]),
        lambda y: y.unflatten(0, (s["T"], s["B"])).transpose(0, 1).flatten(0, 1),
        by_time,
        first=nn.Linear(s["F"], s["C"]),
    ),
}


def by_time(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(0, 1)


def patches(s: Sizes, width: str = "C") -> nn.Module:
    return nn.Conv2d(s["F"], s[width], 2, 2)


#: Networks on images ``(B, F, 2 H, 2 W)`` with ``C`` neurons at ``H`` x ``W`` positions.
IMAGES: dict[str, Callable[[Sizes], Built]] = {
    "conv": lambda s: Built(patches(s), as_is),
    "linear": lambda s: Built(nn.Linear(s["C"], s["C"]), last, lambda x: x.permute(0, 2, 3, 1), first=patches(s)),
    "norm": lambda s: Built(nn.LayerNorm(s["C"]), last, lambda x: x.permute(0, 2, 3, 1), first=patches(s)),
    "group norm": lambda s: Built(nn.GroupNorm(2, s["C"]), as_is, first=patches(s)),
    "channels last inside": lambda s: Built(
        Inside(nn.Linear(s["C"], s["C"]), (0, 2, 3, 1), (0, 3, 1, 2), True), as_is, first=patches(s)
    ),
    "conv inside": lambda s: Built(
        Inside(nn.Conv2d(s["C"], s["C"], 1), (0, 3, 1, 2), (0, 2, 3, 1), True),
        last,
        lambda x: x.permute(0, 2, 3, 1),
        first=patches(s),
    ),
    "tokens": lambda s: Built(
        nn.Linear(s["C"], s["C"]),
        lambda y: y.mT.unflatten(2, (s["H"], s["W"])),
        lambda x: x.flatten(2).mT,
        first=patches(s),
    ),
    "tokens behind a class token": lambda s: Built(
        nn.Linear(s["C"], s["C"]),
        lambda y: y[:, 1:].mT.unflatten(2, (s["H"], s["W"])),
        first=WithClassToken(patches(s), s["C"]),
    ),
    "transposed": lambda s: Built(
        nn.Linear(s["C"], s["C"]), lambda y: y.permute(0, 3, 2, 1), lambda x: x.permute(0, 3, 2, 1), first=patches(s)
    ),
}

FAMILIES = {"sequences": SEQUENCES, "rows": ROWS, "images": IMAGES}


def entered(family: str, s: Sizes) -> Tensor:
    return (
        torch.randn(s["B"], s["F"], 2 * s["H"], 2 * s["W"])
        if family == "images"
        else torch.randn(s["B"], s["T"], s["F"])
    )


def by_hand(net: Built) -> Tensor:
    reading = net.read_by_hand
    return reading.mT if reading.dim() == 2 else reading.transpose(0, 1).flatten(1)


def outcome(family: str, names: tuple[str, str], sizes: tuple[Sizes, Sizes]) -> tuple[str, str]:
    """``"equal"``, ``"told"`` or ``"other"``, with what was told."""
    student, teacher = (FAMILIES[family][name](s) for name, s in zip(names, sizes, strict=True))
    teacher.eval()
    x = entered(family, sizes[0])
    options: dict[str, Any] = {"plan": "exact", "cost": "sqeuclidean", "memory": 0.0, "weight": 1.0, "grid": None}
    select = {net.select for net in (student, teacher)} - {None}
    if len(select) > 1 or (select and None in (student.select, teacher.select)):
        return "told", "one key for both"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transfer = RepresentationTransfer(
            teacher, [LayerPair("layer", "layer", select=next(iter(select), None))], **options
        )
        try:
            with transfer.attached(student):
                student(x)
                value = float(transfer.loss().detach())
        except ValueError as error:
            return "told", str(error)
    if caught:
        return "told", str(caught[0].message)
    expected = transport_distance(by_hand(student), by_hand(teacher), plan="exact", cost="sqeuclidean").value
    return "equal" if value == pytest.approx(float(expected), rel=1e-4) else "other", f"{value} for {float(expected)}"


def drawn(generator: random.Random) -> tuple[str, tuple[str, str], tuple[Sizes, Sizes]]:
    family = generator.choice(list(FAMILIES))
    names = generator.choice(list(FAMILIES[family])), generator.choice(list(FAMILIES[family]))
    shared = {key: generator.choice([2, 4, 4, 6]) for key in "BTFHW"}
    return family, names, ({**shared, "C": generator.choice([2, 4, 4, 6])}, {**shared, "C": generator.choice([4, 6])})


def fails(seeds: range) -> list[str]:
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        drawing = drawn(random.Random(seed))
        # One mixes all positions, the other gives two constants where it has two neurons: nothing shows the axes.
        if "transposed" in drawing[1] and {"norm", "group norm"} & set(drawing[1]):
            continue
        verdict, text = outcome(*drawing)
        if verdict == "other":
            found.append(f"{seed}: {drawing}: {text}")
    return found


@pytest.mark.slow
def test_sizes_that_coincide() -> None:
    assert not fails(range(150))


@pytest.mark.slow
def test_many_sizes_that_coincide() -> None:
    assert not fails(range(150, 3000))


@pytest.mark.parametrize("family", FAMILIES)
def test_other_sizes_are_read_without_a_word(family: str) -> None:
    sizes = {"B": 5, "T": 7, "F": 3, "C": 6, "H": 9, "W": 11}
    for number, name in enumerate(FAMILIES[family]):
        torch.manual_seed(number)
        verdict, text = outcome(family, (name, name), (sizes, {**sizes, "C": 4}))
        is_unknown = verdict == "told" and "ambiguous neuron axis" in text and {"inside", "mixing"} & set(name.split())
        assert verdict == "equal" or is_unknown, (name, text)
