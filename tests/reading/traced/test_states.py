"""States of recurrent modules have no vote on the number of samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.demos.lstm import SimpleLSTM
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer
from lightning_otrt.reading.traced.states import StateShapes
from lightning_otrt.reading.tracer import trace


class Stated(nn.Module):
    """Vectors of (B, T, F), or of (T, B, F), and a state before or after them."""

    def __init__(self, kind: Any = nn.GRU, *, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(5, 8, batch_first=batch_first, **options)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.rnn(x, state)  # type: ignore[no-any-return]


class StateFirst(Stated):
    def forward(self, state: Any, x: Tensor) -> tuple[Tensor, Any]:  # type: ignore[override]
        return super().forward(x, state)


def states(layers: int, samples: int, count: int = 2, width: int = 8) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(layers, samples, width) for _ in range(count))


X = torch.zeros(8, 6, 5)
CASES: dict[str, tuple[nn.Module, tuple[Any, ...], int]] = {
    "Lightning's demo": (
        SimpleLSTM(20, ninp=8, nhid=8, nlayers=2), (torch.zeros(8, 6, dtype=torch.long), states(2, 8)), 8
    ),
    "LSTM": (Stated(nn.LSTM, num_layers=3), (X, states(3, 8)), 8),
    "GRU": (Stated(), (X, states(1, 8, 1)[0]), 8),
    "GRU in two directions": (Stated(bidirectional=True), (X, states(2, 8, 1)[0]), 8),
    "state first": (StateFirst(nn.LSTM), (states(1, 8), X), 8),
    "projected": (
        Stated(nn.LSTM, proj_size=4), (X, (torch.zeros(1, 8, 4), torch.zeros(1, 8, 8))), 8
    ),
    "(T, B, F)": (Stated(batch_first=False), (X, states(1, 6, 1)[0]), 6),
    "two sequences of the width": (nn.GRU(8, 8, num_layers=2, batch_first=True), (torch.zeros(2, 6, 8),), 2),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", CASES)
def test_samples(name: str) -> None:
    model, args, samples = CASES[name]
    assert trace(model, args).batch_size == samples


def test_shapes() -> None:
    shapes = StateShapes.of(nn.ModuleList([nn.LSTM(3, 8, 2, proj_size=4), nn.GRUCell(3, 7), nn.Linear(2, 2)]))
    assert shapes == StateShapes(frozenset({(2, 8), (2, 4)}), frozenset({7}))
    assert not StateShapes().are_states([torch.zeros(2, 8, 8)], [torch.zeros(8, 6)])
    assert not shapes.are_states([torch.zeros(2, 8, 8)], [torch.zeros(5, 6)])


def test_term_of_the_demo() -> None:
    student, teacher = SimpleLSTM(20, ninp=8, nhid=8, nlayers=2), SimpleLSTM(20, ninp=8, nhid=12, nlayers=2)
    ids, state = torch.randint(20, (8, 6)), states(2, 8)
    transfer = RepresentationTransfer(
        teacher,
        {"rnn": "rnn"},
        plan="uniform",
        weight=1.0,
        teacher_inputs=lambda ids, _: (ids, teacher.init_hidden(len(ids))),
    )
    student.eval()
    with transfer.attached(student):
        student(ids, state)
        found = float(transfer.loss().detach())
    rows = [
        net.rnn(net.encoder(ids), net.init_hidden(8))[0].detach().flatten(0, 1).T for net in (student, teacher.eval())
    ]
    expected = (1 - torch.corrcoef(torch.cat(rows))[:8, 8:]).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)
