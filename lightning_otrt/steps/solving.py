"""Solves the plans that are due in a call, those of equal shape together. ``coupling.py`` decides when one is due."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_otrt.steps.coupling import Coupling, Problem
from lightning_otrt.steps.pair_state import PairState, Solved

__all__ = ["solve_plans"]

#: On a CPU, largest cost matrix that is solved together with others: larger ones do not stay in the cache together
#: (benchmarks/speed). On a device all are.
STACKED_ENTRIES = 64 * 64


def solve_plans(
    coupling: Coupling, problems: dict[int, Problem], states: Sequence[PairState]
) -> Iterator[tuple[int, Solved]]:
    """Solve a plan for each problem.

    Args:
        coupling: How to solve.
        problems: Problems by the index of their pair. Each is taken out once it is not needed any more, so that few are
            in memory at the same time.
        states: The states of all pairs.

    Yields:
        The index of a pair and its new plan.
    """
    starts = {index: coupling.start(states[index]) for index in problems}
    for indices in _stacks(problems, starts):
        parts = list(zip(*(problems.pop(index) for index in indices), strict=True))
        problem = [tensors[0][None] if len(tensors) == 1 else torch.stack(tensors) for tensors in parts]
        del parts
        warm = [start for index in indices if (start := starts[index]) is not None]
        plans, potentials, is_finite = coupling.solve(problem, torch.stack(warm) if warm else None)
        del problem
        for row, index in enumerate(indices):
            plan = type(plans)(*(part[row] for part in plans))
            yield index, Solved(plan, None if potentials is None else potentials[row], is_finite[row])


def _stacks(problems: dict[int, Problem], starts: dict[int, Tensor | None]) -> list[list[int]]:
    """Which pairs to solve together: equal shapes and types, all with a start or all without."""
    stacks: dict[tuple[Any, ...], list[int]] = {}
    for index, (matrix, *_) in problems.items():
        alone = matrix.device.type == "cpu" and matrix.numel() > STACKED_ENTRIES
        key = (matrix.shape, matrix.dtype, starts[index] is None, index if alone else None)
        stacks.setdefault(key, []).append(index)
    return list(stacks.values())
