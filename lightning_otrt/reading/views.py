"""From recorded forwards to the neurons of each pair of layers, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.reading.neurons import match_positions
from lightning_otrt.reading.recorder import View

__all__ = ["NoTermError", "matched_neurons", "trained"]


class NoTermError(Exception):
    """Why no term could be formed in this call."""


def trained(views: list[View]) -> list[View]:
    """The views with gradient; all of them where none has one, so that the reason can be told."""
    return [view for view in views if view.has_gradient] or views


def matched_neurons(
    views: Sequence[View], pairs: Sequence[LayerPair]
) -> tuple[list[list[tuple[Tensor, Tensor]]], list[str]]:
    """The neurons of each view and pair.

    Returns:
        For each view, student ``(N, n)`` and teacher ``(M, n)`` of each pair; and the names of the student layers that
        no gradient reaches.

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
        # Not those without gradient, in which another recorder of this student traces its layers.
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
