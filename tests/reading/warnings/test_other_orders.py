"""Rows of several views, and maps, whose order in one network is not that in the other one."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer, compare_representations

ROWS, MAPS = "several rows for each sample", "with height and width in another order"


class Views(nn.Module):
    """A layer on the rows that the views of the samples are folded to."""

    def __init__(self, fold: Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.fold, self.layer, self.head = fold, nn.Sequential(nn.Linear(5, width), nn.ReLU()), nn.Linear(width, 3)

    def forward(self, *views: Tensor) -> Tensor:
        x = views[0] if len(views) == 1 else torch.stack(views, 1)
        logits: Tensor = self.head(self.layer(self.fold(x)))
        return logits


FOLDS: dict[str, Callable[[Tensor], Tensor]] = {
    "by sample": lambda x: x.flatten(0, 1),
    "by sample, stacked": lambda x: torch.stack(x.unbind(1), 1).reshape(-1, *x.shape[2:]),
    "by view": lambda x: torch.cat(x.unbind(1)),
    "by view, transposed": lambda x: x.transpose(0, 1).flatten(0, 1),
    "by sample, backwards": lambda x: x.flip(1).flatten(0, 1),
    "by view, backwards": lambda x: torch.cat(x.unbind(1)[::-1]),
}


def kind(fold: str) -> str:
    return fold.removesuffix(", stacked").removesuffix(", transposed")


def told(student: nn.Module, teacher: nn.Module, *inputs: object, layer: str = "layer", **options: object) -> list[str]:
    transfer = RepresentationTransfer(teacher, [LayerPair(layer, layer)], plan="identity", **options)
    with warnings.catch_warnings(record=True) as caught, transfer.attached(student):
        warnings.simplefilter("always")
        student(*inputs)
        transfer.loss()
    # Of rows of unknown number, whatever their order.
    return [text for text in (str(warning.message) for warning in caught) if "neither that of the samples" not in text]


@pytest.mark.parametrize(("samples", "views", "separate"), [(2, 2, False), (4, 4, True), (9, 2, True), (3, 4, False)])
def test_rows_of_views(samples: int, views: int, separate: bool) -> None:
    x = torch.randn(samples, views, 5)
    inputs = x.unbind(1) if separate else (x,)
    for own in FOLDS:
        for other in FOLDS:
            messages = told(Views(FOLDS[own]), Views(FOLDS[other]), *inputs)
            assert [ROWS in message for message in messages] == [True] * (kind(own) != kind(other)), (own, other)


def by_frame(images: Tensor) -> Tensor:
    return images.flatten(0, 1)


def by_time(images: Tensor) -> Tensor:
    return images.transpose(0, 1).flatten(0, 1)


class Frames(nn.Module):
    """A convolution over the frames of each sample."""

    def __init__(self, fold: Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.fold, self.layer, self.head = fold, nn.Conv2d(3, width, 3), nn.Linear(width, 3)

    def forward(self, video: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(self.fold(video)).mean((2, 3)))
        return logits


def test_rows_of_frames() -> None:
    video = torch.randn(3, 3, 3, 6, 6)
    assert [ROWS in message for message in told(Frames(by_frame), Frames(by_time), video)] == [True]
    assert told(Frames(by_time), Frames(by_time), video) == []


class Corners(nn.Module):
    """The four corners of each image as rows, which no axis of the inputs shows."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order, self.layer = order, nn.Linear(16, 6)

    def forward(self, images: Tensor) -> Tensor:
        corners = images.unflatten(2, (2, 4)).unflatten(4, (2, 4))[:, 0].transpose(2, 3).flatten(3).flatten(1, 2)
        rows: Tensor = self.layer(corners[:, self.order].flatten(0, 1))
        return rows


def test_rows_of_crops() -> None:
    images, order = torch.randn(3, 1, 8, 8), (0, 1, 2, 3)
    assert told(Corners(order), Corners(order), images) == []
    assert [ROWS in message for message in told(Corners(order), Corners((0, 2, 1, 3)), images)] == [True]


class Maps(nn.Module):
    def __init__(self, turn: Callable[[Tensor], Tensor], width: int = 6, *, last: bool = False) -> None:
        super().__init__()
        self.turn, self.last = turn, last
        self.layer = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.linear, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layer(self.turn(images.movedim(3, 1) if self.last else images))
        logits: Tensor = self.head(self.linear(maps.movedim(1, -1)).mean((1, 2)))
        return logits


class Patches(nn.Module):
    """Tokens of the patches."""

    def __init__(self, turn: Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.turn, self.embed = turn, nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(self.turn(images)).flatten(2).mT
        found: Tensor = self.layer(torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1))[:, 0]
        return found


def plain(images: Tensor) -> Tensor:
    return images


TURNS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": plain,
    "transposed": lambda images: images.transpose(2, 3),
    "turned": lambda images: images.rot90(1, (2, 3)),
}


SITUATIONS = [
    ("layer", 3, (32, 32)),
    ("layer", 8, (32, 32)),
    ("layer", 8, (32, 16)),
    ("linear", 3, (16, 32)),
    ("channels last", 3, (32, 32)),
    ("tokens", 3, (32, 32)),
    ("map and tokens", 8, (32, 32)),
]


@pytest.mark.parametrize(("layer", "samples", "sizes"), SITUATIONS)
def test_axes_of_maps(layer: str, samples: int, sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    images, last = torch.randn(samples, 3, *sizes), layer == "channels last"
    images = images.movedim(1, 3) if last else images
    for own, turn in TURNS.items():
        for other, another in TURNS.items():
            student = Patches(turn) if layer == "tokens" else Maps(turn, last=last)
            teacher = Patches(another) if "tokens" in layer else Maps(another, last=last)
            name = "linear" if layer == "linear" else "layer"
            messages = told(student.eval(), teacher.eval(), images, layer=name, cost="sqeuclidean")
            assert [MAPS in message for message in messages] == [True] * ((own == "plain") != (other == "plain")), (
                own,
                other,
            )
    assert told(Maps(plain), Maps(TURNS["turned"]), torch.randn(4, 3, *sizes), grid=1) == []


def test_comparisons_tell_it_too() -> None:
    images = torch.randn(4, 3, 32, 32)
    nets = Maps(plain), Maps(TURNS["transposed"])
    with pytest.warns(UserWarning, match=MAPS) as caught:
        compare_representations(*nets, [images], layers=["layer.0", "layer"], progress=False)
    assert len(caught) == 1


def test_maps_that_mix_all_positions_say_nothing() -> None:
    class Global(Maps):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images - images.mean((2, 3), keepdim=True).expand_as(images))

    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 6, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(torch.fft.fft2(images).real).mean((2, 3))

    images = torch.randn(8, 3, 16, 16)
    assert told(Global(plain), Global(plain), images) == []
    assert told(Fourier(), Maps(plain), images) == []
