"""Solves the plans that are due in a call, those of equal shape together. ``coupling.py`` decides when one is due."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_otrt.steps.coupling import Coupling, Problem
from lightning_otrt.steps.pair_state import PairState, Solved
from lightning_otrt.steps.stacking import Group

__all__ = ["solve_plans"]

#: On a CPU, largest cost matrix that is solved together with others: larger ones do not stay in the cache together
#: (benchmarks/speed). On a device all are.
STACKED_ENTRIES = 64 * 64


def solve_plans(
    coupling: Coupling, problems: dict[Group, Problem], states: Mapping[Group, PairState]
) -> Iterator[tuple[Group, Solved]]:
    """Solve the plans of each problem.

    Args:
        coupling: How to solve.
        problems: Problems by group of pairs; those of several pairs have a leading dimension. Each is taken out once it
            is not needed any more, so that few are in memory at the same time.
        states: The states of the groups.

    Yields:
        A group and its new plans.
    """
    starts = {group: coupling.start(states[group]) for group in problems}
    for groups in _stacks(problems, starts):
        parts = list(zip(*(problems.pop(group) for group in groups), strict=True))
        problem = [_joined(groups, tensors) for tensors in parts]
        del parts
        warm = [start for group in groups if (start := starts[group]) is not None]
        plans, potentials, is_finite = coupling.solve(problem, _joined(groups, warm) if warm else None)
        del problem
        stop = 0
        for group in groups:
            first, stop = stop, stop + len(group)
            rows = first if len(group) == 1 else slice(first, stop)
            plan = type(plans)(*(part[rows] for part in plans))
            yield group, Solved(plan, None if potentials is None else potentials[rows], is_finite[rows])


def _joined(groups: Sequence[Group], tensors: Sequence[Tensor]) -> Tensor:
    """One tensor with a leading dimension for those of several groups."""
    rows = [tensor[None] if len(group) == 1 else tensor for group, tensor in zip(groups, tensors, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _stacks(problems: Mapping[Group, Problem], starts: Mapping[Group, Tensor | None]) -> list[list[Group]]:
    """What to solve together: equal shapes and types, all with a start or all without."""
    stacks: dict[tuple[Any, ...], list[Group]] = {}
    for group, (matrix, *_) in problems.items():
        alone = matrix.device.type == "cpu" and matrix.numel() > STACKED_ENTRIES
        key = (matrix.shape[-2:], matrix.dtype, starts[group] is None, group if alone else None)
        stacks.setdefault(key, []).append(group)
    return list(stacks.values())
