"""Compares layers, settings and solved plans of the processes of a global batch; sends plans where they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_otrt.notices import warn
from lightning_otrt.steps.pair_state import PairState
from lightning_otrt.steps.ranks import Ranks

__all__ = ["SamePlans", "agree", "check_same"]


def agree(ranks: Ranks, settings: Mapping[str, Any], problem: str = "", facts: Any = None) -> list[Any]:
    """Compare the settings of all processes, and raise on each of them what is wrong on one. A collective.

    Args:
        ranks: The processes.
        settings: See :func:`check_same`; those of this process.
        problem: What is wrong on this process; empty if nothing is.
        facts: What the others are to know besides.

    Returns:
        The facts of each process.

    Raises:
        ValueError: If a process has other settings than process 0, or a problem.
    """
    gathered = ranks.gather((settings, problem, facts))
    check_same([theirs for theirs, _, _ in gathered])
    for rank, (_, theirs, _) in enumerate(gathered):
        if theirs:
            raise ValueError(f"Process {rank} of {ranks.size}: {theirs}")
    return [theirs for _, _, theirs in gathered]


def check_same(settings: Sequence[Mapping[str, Any]]) -> None:
    """Check that all processes have the same settings.

    Args:
        settings: For each process, its settings by what they are, for the error.

    Raises:
        ValueError: If one has others than process 0.

    Example:
        >>> check_same([{"cost": "correlation"}, {"cost": "correlation"}])
    """
    for rank, theirs in enumerate(settings):
        for what, value in settings[0].items():
            if theirs[what] != value:
                raise ValueError(
                    f"The processes of the global batch disagree on the {what} of the transfer term: process 0 has "
                    f"{value}, but process {rank} has {theirs[what]}. Build model, teacher and options alike on all of "
                    "them, or pass global_batch=False."
                )


class SamePlans:
    """Keeps the plans of all processes equal. Each solves them from the same sums, which may differ by rounding."""

    def __init__(self) -> None:
        self._is_compared = self._is_sent = False

    def keep(self, ranks: Ranks, states: Sequence[PairState]) -> None:
        """Compare the plans of the first solve; if they differ, all use those of process 0 from then on. A collective.

        Args:
            ranks: The processes.
            states: The pairs whose plans were solved in this call.
        """
        plans = [state.plan for state in states]
        potentials = [state.potential for state in states]
        if not self._is_compared:
            self._is_compared = True
            solved = [plan.matrix for plan in plans if plan is not None]
            self._is_sent = not ranks.have_same(solved + [each for each in potentials if each is not None])
            if self._is_sent:
                warn(
                    "The processes solved transport plans from the same sums that differ in some bits, as on unlike "
                    "devices. From now on all use those of process 0, at the price of one broadcast for each solve.",
                )
        if self._is_sent:
            plans, potentials = ranks.broadcast((plans, potentials))
            for state, plan, potential in zip(states, plans, potentials, strict=True):
                state.plan, state.potential = plan, potential
