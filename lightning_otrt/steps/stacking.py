"""Pairs of equal shape as one: their neurons and their states with a leading dimension.

On a device the time of a call is that of its kernels' launches, and five pairs then cost as many as one. A CPU launches
nothing, and matrices of several pairs do not stay in its cache together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_otrt.steps.coupling import Coupling
from lightning_otrt.steps.pair_state import PairState

__all__ = ["Group", "Stacks", "group_pairs", "is_stacked", "stacked"]

#: Indices of pairs that are computed together.
Group: TypeAlias = tuple[int, ...]
#: Neurons of student and teacher, for each view.
_Views: TypeAlias = Sequence[tuple[Tensor, Tensor]]


def is_stacked(device: torch.device) -> bool:
    """Whether pairs are computed together on a device."""
    return device.type != "cpu"


def group_pairs(
    batches: Mapping[int, _Views], states: Sequence[PairState], couplings: Sequence[Coupling]
) -> list[Group]:
    """Which pairs to compute together: those whose neurons and states have equal shapes and types.

    Args:
        batches: Neurons of the pairs that have any.
        states: The states of all pairs.
        couplings: Those of all pairs.

    Returns:
        Each index of ``batches`` once.
    """
    groups: dict[Any, list[int]] = {}
    for index, views in batches.items():
        groups.setdefault(_kind(index, views, states[index], couplings[index]), []).append(index)
    return [tuple(indices) for indices in groups.values()]


def _kind(index: int, views: _Views, state: PairState, coupling: Coupling) -> object:
    (y, x), *others = views
    if others or not coupling.may_stack:
        return index
    tensors = (y, x, *state.tensors())
    return id(coupling), state.memory, state.layout(), *((tensor.shape, tensor.dtype) for tensor in tensors)


def stacked(views: Sequence[_Views]) -> list[tuple[Tensor, Tensor]]:
    """The views of the pairs of a group; with a leading dimension where there are several."""
    if len(views) == 1:
        return list(views[0])
    sides = [zip(*pairs, strict=True) for pairs in zip(*views, strict=True)]
    return [(torch.stack(tuple(y)), torch.stack(tuple(x))) for y, x in sides]


class Stacks:
    """States of groups of pairs. What a group keeps is stacked once: the states of its pairs hold rows of it."""

    def __init__(self) -> None:
        #: For each group the stacked tensors, with their rows in the states.
        self._known: dict[Group, list[tuple[Tensor, tuple[Tensor, ...]]]] = {}

    def join(self, group: Group, states: Sequence[PairState]) -> PairState:
        """One state for a group, with a leading dimension in all its tensors where there are several pairs.

        Args:
            group: The group.
            states: The states of its pairs.
        """
        if len(group) == 1:
            return states[0]
        known = {tuple(map(id, rows)): stack for stack, rows in self._known.get(group, ())}
        columns = zip(*(state.tensors() for state in states), strict=True)
        stacks = [known[key] if (key := tuple(map(id, rows))) in known else torch.stack(rows) for rows in columns]
        joined = PairState()
        joined.take(states[0], stacks)
        return joined

    def split(self, group: Group, joined: PairState, states: Sequence[PairState]) -> None:
        """Give the pairs of a group what their joined state has become."""
        if len(group) == 1:
            return
        known = {id(stack): rows for stack, rows in self._known.get(group, ())}
        stacks = joined.tensors()
        self._known[group] = [(stack, known.get(id(stack)) or stack.unbind()) for stack in stacks]
        for number, state in enumerate(states):
            state.take(joined, [rows[number] for _, rows in self._known[group]])

    def forget_all_but(self, groups: Iterable[Group]) -> None:
        """Let go of the stacks of other groups."""
        self._known = {group: self._known[group] for group in groups if group in self._known}
