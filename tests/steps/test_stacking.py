"""Pairs of equal shape are computed together on a device. Here a CPU is made to do so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from engines import TERMS, draw, make
from torch import Tensor

from lightning_otrt.steps.engine import TransportEngine
from lightning_otrt.steps.pair_state import PairState
from lightning_otrt.steps.stacking import Stacks

#: Student and teacher neurons of each pair: three of one shape, and one of another.
SHAPES = [(12, 9), (7, 9), (12, 9), (12, 9)]


def batch(seed: int) -> list[tuple[Tensor, Tensor]]:
    return [draw(*shape, seed=10 * seed + index, dtype=torch.float64) for index, shape in enumerate(SHAPES)]


def run(engine: TransportEngine, calls: int = 5) -> list[Any]:
    """Values, gradients and plans; in one call a pair did not run, and in another one is not finite."""
    found = []
    for number in range(calls):
        pairs, absent = batch(number), ()
        if number == 2:
            pairs[2], absent = tuple(side[:, :0].detach().requires_grad_() for side in pairs[2]), (2,)
        if number == 3:
            pairs[3][1][0, 0] = torch.nan
        loss, distances = engine.term([pairs], 40, absent=absent)
        loss.backward()
        found.append((loss.detach(), [y.grad for y, _ in pairs], [distance.matrix for distance in distances]))
    return found


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize("solve_every", [1, 10])
def test_pairs_together_are_as_alone(
    term: str, memory: float, solve_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"pairs": len(SHAPES), "memory": memory, "solve_every": solve_every}
    alone = make(term, **options)
    expected = run(alone)
    monkeypatch.setattr("lightning_otrt.steps.engine.is_stacked", lambda device: True)
    together = make(term, **options)
    torch.testing.assert_close(run(together), expected, rtol=1e-9, atol=1e-12, equal_nan=True)
    saved, other = together.state_dict(), alone.state_dict()
    for own, theirs in zip(saved["pairs"], other["pairs"], strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)
    # Rows of a stack are saved and restored like tensors of their own.
    resumed = make(term, **options)
    resumed.load_state_dict(copy.deepcopy(saved), torch.device("cpu"))
    torch.testing.assert_close(run(resumed, 2), run(together, 2), rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("plan", ["uniform", "random", "exact", "static"])
def test_other_plans(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(make(pairs=len(SHAPES), plan=plan))
    monkeypatch.setattr("lightning_otrt.steps.engine.is_stacked", lambda device: True)
    torch.testing.assert_close(run(make(pairs=len(SHAPES), plan=plan)), expected, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_states_are_stacked_once() -> None:
    """What no call has changed is not copied again, and pairs that change on their own are."""
    stacks, states = Stacks(), [PairState(energy=torch.tensor([float(number), 1.0])) for number in range(2)]
    group = (3, 5)
    joined = stacks.join(group, states)
    joined.potential = torch.arange(6.0).view(2, 3)
    stacks.split(group, joined, states)
    assert [state.potential.tolist() for state in states] == [[0, 1, 2], [3, 4, 5]]
    again = stacks.join(group, states)
    assert again.potential is joined.potential
    again.potential.add_(1)
    stacks.split(group, again, states)
    assert states[1].potential.tolist() == [4, 5, 6]
    states[0].potential = torch.zeros(3)
    assert stacks.join(group, states).potential.tolist() == [[0, 0, 0], [4, 5, 6]]
    stacks.forget_all_but([(3,)])
    assert stacks.join(group, states).energy is not joined.energy
