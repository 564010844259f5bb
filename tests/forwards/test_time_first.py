"""One network takes samples first, the other one times, and a batch has as many of both."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

SIZE = 7
WARNING = "samples along axis [01] of its sequences, and the teacher .* along axis [01], but both get the same inputs"


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool, width: int = 6) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, width), nn.Linear(width, 2)
        self.layer = nn.GRU(width, width, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x))[0])


class Transformer(nn.Module):
    def __init__(self, batch_first: bool, width: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, width), nn.Linear(width, 2)
        layer = nn.TransformerEncoderLayer(width, 2, 8, 0.0, batch_first=batch_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)))


class Turned(nn.Module):
    """Samples come first, whatever the network inside takes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.transpose(0, 1)).transpose(0, 1)


def told(student: nn.Module, teacher: nn.Module, **options: Any) -> list[str]:
    torch.manual_seed(0)
    transfer = RepresentationTransfer(teacher, ["embed"], plan="uniform", **options)
    with transfer.attached(student), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        student(torch.randn(SIZE, SIZE, 3))
        transfer.loss()
    return [str(one.message) for one in found]


@pytest.mark.parametrize("kinds", [(Recurrent, Recurrent), (Transformer, Recurrent), (Recurrent, Transformer)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_it_is_told(kinds: tuple[Callable[[bool], nn.Module], ...], batch_first: bool) -> None:
    student, teacher = kinds[0](batch_first), kinds[1](not batch_first)
    messages = told(student, teacher)
    assert len(messages) == 1
    assert messages[0].startswith(
        f"The student ({kinds[0].__name__}) has the samples along axis {int(not batch_first)} "
    )
    assert not told(student, teacher, teacher_inputs=lambda x: x.transpose(0, 1))
    assert not told(student, kinds[1](batch_first))


def test_a_network_that_turns_its_inputs() -> None:
    transfer = RepresentationTransfer(Recurrent(True), {"net.embed": "embed"}, plan="uniform")
    student = Turned(Recurrent(False))
    with transfer.attached(student):
        student(torch.randn(SIZE, SIZE, 3))
        transfer.loss()


def test_other_sizes_are_an_error() -> None:
    transfer = RepresentationTransfer(Recurrent(True), ["embed"], plan="uniform")
    student = Recurrent(False)
    with transfer.attached(student):
        with pytest.warns(UserWarning, match=WARNING):
            student(torch.randn(SIZE, SIZE + 1, 3))
        with pytest.raises(ValueError, match="teacher"):
            transfer.loss()
