"""The warning where networks pick the positions of matched layers, such as the queries of a detector, by own scores."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_otrt.layers.names import listed
from lightning_otrt.layers.pairs import LayerPair
from lightning_otrt.layers.trace import Trace, TracedLayer
from lightning_otrt.notices import warn

__all__ = ["warn_of_picked_positions"]

#: A larger share of equal positions needs no warning, as where the student starts as a copy of the teacher. It says
#: nothing where all samples have the same ones, as where an untrained network gives all positions one score.
_MOSTLY_SAME = 0.9
#: Layers that the warning names; the others it counts.
_SHOWN = 6
#: Layers that it says may be taken instead.
_INSTEAD = 3


def warn_of_picked_positions(pairs: Sequence[LayerPair], student: Trace, teacher: Trace, grid: int | None) -> None:
    """Warn once where a position of a pair is another one in the student than in the teacher.

    Args:
        pairs: The layers that are matched.
        student: Trace of the student.
        teacher: Trace of the teacher.
        grid: Number of segments along each axis; with 1 all positions are averaged, and their order means nothing.
    """
    found: dict[str, float | None] = {}
    for pair in pairs:
        own, other = student.picked_positions.get(pair.student), teacher.picked_positions.get(pair.teacher)
        share = _share(own, other) if own and other else None
        if (own or other) and not (share is not None and share >= _MOSTLY_SAME and _tells(own or ())):
            found[f"{pair.student} -> {pair.teacher}"] = share
    if not found or grid == 1:
        return
    shares = [share for share in found.values() if share is not None and share < _MOSTLY_SAME]
    same = f"In the first batch it is the same in {max(shares):.0%} of the cases. " if shares else ""
    instead = [_before(trace) for trace in (student, teacher)]
    such = f", such as {instead[0]} of the student and {instead[1]} of the teacher" if all(instead) else ""
    warn(
        f"The pairs {listed([*found], _SHOWN)} hold positions that a network picks by scores of its own, as a detector "
        f"picks its queries. So position i of the student is another one than position i of the teacher. {same}Match "
        f"layers before the choice{such}, or pass grid=1, which takes the mean of all positions.",
    )


def _share(first: tuple[tuple[int, ...], ...], second: tuple[tuple[int, ...], ...]) -> float | None:
    """In which share of places both picked the same; None where they picked other numbers of positions."""
    if [len(row) for row in first] != [len(row) for row in second]:
        return None
    equal = [one == other for rows in zip(first, second, strict=True) for one, other in zip(*rows, strict=True)]
    return sum(equal) / len(equal)


def _tells(chosen: tuple[tuple[int, ...], ...]) -> bool:
    """Whether the samples have other positions, so that they depend on values; true for a single sample."""
    return len(chosen) == 1 or len(set(chosen)) > 1


def _before(trace: Trace) -> list[str]:
    """The last modules that give a map, of each size, before the first layer with picked positions."""
    orders = [trace.layer(name).order or 0 for name in trace.picked_positions]
    maps: dict[tuple[int, ...], TracedLayer] = {}
    for layer in sorted(trace.layers, key=lambda layer: layer.order or 0):
        tensor = layer.output
        if layer.is_container and layer.calls == 1 and tensor is not None and len(tensor.shape) == 4:
            size = tensor.positions
            if min(size) > 1 and tensor.neuron_axis is not None and (layer.order or 0) < min(orders, default=1 << 62):
                maps[size] = layer
    return [layer.name for layer in maps.values()][-_INSTEAD:]
