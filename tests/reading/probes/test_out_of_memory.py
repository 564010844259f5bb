"""A network that runs out of memory while it is looked at says so: it is not taken for one that cannot run."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from forwards.masked import FRAMES, SITUATIONS, Scores, Situation
from torch import Tensor, nn

from lightning_otrt import LayerPair, RepresentationTransfer


class Experts(nn.Module):
    """Three layers of one type in a list, of which each may get rows of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for expert in self.experts:
            x = expert(x).tanh()
        return x


NAMES = "torch decoder", "torch encoder, (T, B, C)", "(B, C, T)", "tower with the mask"
LOOKED_AT = {
    **{name: SITUATIONS[name] for name in NAMES},
    "experts": Situation(Experts, (FRAMES[:, 0],), "experts.1", None),
    # As many tokens as samples: sizes do not tell the axis of the samples.
    "square": Situation(
        Scores, tuple(value[:, : len(value)] for value in SITUATIONS["added to scores"].args), "mix", None
    ),
}


def _call(network: nn.Module, situation: Situation) -> Any:
    return network(*situation.args, **situation.kwargs)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", LOOKED_AT)
def test_want_of_memory_is_an_error(name: str, side: str) -> None:
    """In any one forward of the first step, and as the error that torch raises. The next batch is then the first."""
    situation = LOOKED_AT[name]
    calls, fails_in, failed = itertools.count(1), 0, 0

    def fail(module: nn.Module, args: Any) -> None:
        if next(calls) == fails_in:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    while failed == fails_in:
        fails_in += 1
        torch.manual_seed(0)
        student, teacher = situation.build(8), situation.build(12)
        network = student if side == "student" else teacher
        network.get_submodule(situation.layer).register_forward_pre_hook(fail)
        transfer = RepresentationTransfer(teacher, [LayerPair(situation.layer, situation.layer, **situation.options)])
        calls = itertools.count(1)
        with transfer.attached(student):
            try:
                _call(student, situation)
            except torch.OutOfMemoryError:
                failed += 1
                _call(student, situation)
            assert float(transfer.loss().detach()) > 0
    assert next(calls) <= fails_in  # it did not run so often
    assert failed > 1
