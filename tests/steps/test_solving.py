"""Plans of equal shape are solved together, and are those of a solve alone."""

from __future__ import annotations

import pytest
import torch
from engines import call, draw, make
from torch import Tensor

from lightning_otrt.steps.coupling import Problem
from lightning_otrt.steps.entropic_coupling import EntropicCoupling
from lightning_otrt.steps.pair_state import PairState, Solved
from lightning_otrt.steps.solving import STACKED_ENTRIES, solve_plans
from lightning_otrt.steps.stacking import Group
from lightning_otrt.transport.named_costs import get_cost


class Watched(EntropicCoupling):
    """Notes the shape of the costs of each solve, and whether it starts from potentials."""

    def __init__(self) -> None:
        super().__init__(get_cost("correlation"), 0.05)
        self.solves: list[tuple[tuple[int, ...], bool]] = []

    def solve(self, problem: Problem, start: Tensor | None) -> Solved:
        self.solves.append((tuple(problem[0].shape), start is not None))
        return super().solve(problem, start)


def problem(rows: int, columns: int, seed: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve_all(coupling: EntropicCoupling, problems: dict[int, Problem], states: list[PairState]) -> None:
    groups: dict[Group, Problem] = {(index,): problem for index, problem in problems.items()}
    for group, solved in solve_plans(coupling, groups, {(index,): state for index, state in enumerate(states)}):
        assert group not in groups, "the cost matrix is kept longer than it is needed"
        states[group[0]].keep(solved)
    assert not groups


def test_equal_shapes_are_solved_at_once() -> None:
    wide = int(STACKED_ENTRIES**0.5) + 1  # on a CPU larger matrices are not stacked
    shapes = [(12, 9), (7, 9), (12, 9), (wide, wide), (wide, wide)]
    together, alone = Watched(), Watched()
    states, singles = [PairState() for _ in shapes], [PairState() for _ in shapes]
    for number in range(3):
        costs = {index: [problem(*shape, seed=10 * number + index)] for index, shape in enumerate(shapes)}
        for index, cost in costs.items():
            solve_all(alone, {0: [cost[0].clone()]}, [singles[index]])
        solve_all(together, costs, states)
        is_warm = number > 0
        expected = [(2, 12, 9), (1, 7, 9), (1, wide, wide), (1, wide, wide)]
        assert together.solves == [(shape, is_warm) for shape in expected]
        together.solves.clear()
        for state, single in zip(states, singles, strict=True):
            torch.testing.assert_close(state.plan, single.plan, rtol=1e-9, atol=1e-15)
            torch.testing.assert_close(state.potential, single.potential, rtol=1e-9, atol=1e-12)


def test_pairs_with_and_without_potentials_are_not_mixed() -> None:
    """A pair that was skipped at first starts from nothing, not from the potential of another."""
    coupling, states = Watched(), [PairState(), PairState()]
    solve_all(coupling, {0: [problem(6, 5, seed=0)]}, states)
    solve_all(coupling, {0: [problem(6, 5, seed=1)], 1: [problem(6, 5, seed=2)]}, states)
    assert coupling.solves[1:] == [((1, 6, 5), True), ((1, 6, 5), False)]


def test_types_are_not_mixed() -> None:
    dtypes = torch.float32, torch.float64
    coupling, states = Watched(), [PairState(), PairState()]
    solve_all(coupling, {index: [problem(6, 5, seed=0).to(dtype)] for index, dtype in enumerate(dtypes)}, states)
    assert [state.plan.matrix.dtype for state in states] == list(dtypes)


def test_engine_stacks_its_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(pairs=2)
    watched = Watched()
    monkeypatch.setattr(engine, "couplings", [watched] * 2)
    call(engine, draw(seed=0), draw(seed=1))
    assert watched.solves == [((2, 12, 9), False)]
