"""The readings of one forward of the student, and the neurons of each pair of layers, or why there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.reading.positions import match_positions

__all__ = ["NoTermError", "View", "matched_neurons", "trained_views"]


@dataclass
class View:
    """What was recorded in one forward of the student: readings ``(B, C, *positions)`` by key, in order of the calls.

    Attributes:
        root: Name of the module whose forward it was.
        student: Readings of the student, part of the autograd graph.
        teacher: Readings of the teacher, without graph.
        masks: The padding masks of the forward by the key of their source: ``(B, T)``, true where a token is valid;
            None where the argument was not given.
    """

    root: str
    student: dict[str, list[Tensor]] = field(default_factory=dict)
    teacher: dict[str, list[Tensor]] = field(default_factory=dict)
    masks: dict[str, Tensor | None] = field(default_factory=dict)

    @property
    def has_gradient(self) -> bool:
        """Whether it trains the student. It does not where the parameters are frozen for this step, as in GANs."""
        return any(reading.requires_grad for readings in self.student.values() for reading in readings)

    @property
    def samples(self) -> int:
        """The number of samples, 0 if nothing was recorded."""
        return next((readings[0].shape[0] for readings in self.student.values()), 0)


class NoTermError(Exception):
    """No term can be formed in this call; the message says why."""


def trained_views(views: list[View]) -> list[View]:
    """The views with gradient. If none has one, all of them, so that the error can say why."""
    return [view for view in views if view.has_gradient] or views


def matched_neurons(
    views: Sequence[View], pairs: Sequence[LayerPair]
) -> tuple[list[list[tuple[Tensor, Tensor]]], list[str]]:
    """The neurons of each view and pair.

    Args:
        views: What was recorded; the key of a pair is its number.
        pairs: The pairs.

    Returns:
        For each view, student ``(N, n)`` and teacher ``(M, n)`` of each pair; and the names of the student layers that
        get no gradient.

    Raises:
        NoTermError: If a layer did not run or ran more than once, or no layer gets a gradient.
        ValueError: If the readings of a pair have different positions that cannot be matched.
    """
    matched = [[_match(index, pair, view) for index, pair in enumerate(pairs)] for view in views]
    constant = [
        pair.student for index, pair in enumerate(pairs) if not any(view[index][0].requires_grad for view in matched)
    ]
    if len(constant) == len(pairs):
        raise NoTermError(
            f"The transfer term is constant: the outputs of the student layers {constant} do not depend on any "
            "parameter that requires a gradient. Unfreeze the layers, choose others, or check for `no_grad`, "
            "`detach` and reentrant activation checkpointing (use_reentrant=False is supported)."
        )
    return matched, constant


def _match(index: int, pair: LayerPair, view: View) -> tuple[Tensor, Tensor]:
    found = []
    for side, name, readings in (("student", pair.student, view.student), ("teacher", pair.teacher, view.teacher)):
        calls = readings.get(f"{index}", [])
        # Another transfer may trace this student inside the recorded forward; those readings have no gradient.
        calls = [reading for reading in calls if reading.requires_grad] or calls
        if len(calls) != 1:
            how = "did not run" if not calls else f"ran {len(calls)} times"
            raise NoTermError(
                f"The {side} layer {name!r} {how} in this forward, but a representation is one call. A branch that "
                "is skipped in training, a shared module, or code compiled before the layer was hooked are likely "
                "causes; choose a layer that runs once, such as its parent."
            )
        found.append(calls[0])
    return match_positions(found[0], found[1], f"{pair.student!r} -> {pair.teacher!r}")
