"""What the processes of a global batch tell each other in a call, and the sums that they keep of it as shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_otrt.steps.pair_state import PairState
from lightning_otrt.transport.cost import Rounds, Sums, decay_and_add

__all__ = ["Message", "Observed", "added", "fed", "scaled"]


class Message(NamedTuple):
    """What one pair of a process tells the others in a call. They receive the sum over processes of every tensor.

    Attributes:
        counts: Observations of each view.
        energy: The share of this process in the running scale of the teacher.
        sums: For a due plan: the sums of each view.
        samples: For a due plan: the samples of the call.
        running: For a due plan with memory: the share of this process in the running sums.
        not_finite: For sums that feed the running ones and stay here: 1 if they are not finite, else 0.
        rounds: Without a due plan: the first round of the value of each view.
    """

    counts: Tensor
    energy: Tensor | None
    sums: list[Sums]
    samples: Tensor | None
    running: Sums | None
    not_finite: Tensor | None
    rounds: list[Sums]


@dataclass
class Observed:
    """What the exchange of a call leaves for the values of a pair: the sums of all processes, or begun rounds.

    Attributes:
        views: The views in which the pair ran on some process. Sums, rounds and replies are those of these views.
        sums: The sums of each view over all processes.
        energy: The scale of the teacher over all processes.
        reference: The points around which the sums were taken.
        rounds: For each view a generator that waits for the answer to its first round.
        replies: Those answers.
    """

    views: list[int]
    sums: list[Sums] = field(default_factory=list)
    energy: Tensor | None = None
    reference: tuple[Tensor, Tensor] | None = None
    rounds: list[Rounds] = field(default_factory=list)
    replies: list[Sums] = field(default_factory=list)


def fed(state: PairState, running: Sums | None, new: Sums, is_finite: Tensor) -> Sums:
    """The running sums with new ones, or those alone at the start. Sums that are not finite add nothing."""
    assert state.memory is not None
    running = [torch.zeros_like(part) for part in new] if running is None else running
    return decay_and_add(running, state.memory, new, is_finite)


def added(sums: Sequence[Sums]) -> Sums:
    """The sums of several views as one."""
    return [torch.stack(parts).sum(0) if len(parts) > 1 else parts[0] for parts in zip(*sums, strict=True)]


def scaled(state: dict[str, Any], factor: float) -> dict[str, Any]:
    """The state of an engine with its additive statistics times ``factor``."""

    def scale(pair: dict[str, Any]) -> dict[str, Any]:
        sums, energy = pair["sums"], pair["energy"]
        return {
            **pair,
            "sums": None if sums is None else [part * factor for part in sums],
            "energy": None if energy is None else energy * factor,
        }

    return {**state, "pairs": [scale(pair) for pair in state["pairs"]]}
