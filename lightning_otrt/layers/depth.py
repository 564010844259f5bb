"""Which block of a teacher belongs to which block of a student: by resolution first, then by relative depth."""

from __future__ import annotations

import math

from lightning_otrt.layers.automatic import block_groups, evenly_spaced
from lightning_otrt.layers.trace import Trace

__all__ = ["pair_blocks"]


def pair_blocks(student: Trace, teacher: Trace) -> list[tuple[str, str]]:
    """Pairs (student block, teacher block), one for each block of the student, in its order.

    Where both networks have as many parts (encoder and decoder), part goes with part. In a part, maps of one
    resolution go together, so that feature pyramids, which complete from coarse to fine, are paired the right way
    round. What is left goes by relative depth.

    Args:
        student: Trace of the student.
        teacher: Trace of the teacher.
    """
    groups = _of_shared_kinds(block_groups(student), block_groups(teacher), student, teacher)
    if len(groups[0]) != len(groups[1]):
        groups = [_joined(groups[0], student)], [_joined(groups[1], teacher)]
    return [
        pair
        for own, other in zip(*groups, strict=True)
        for pair in zip(own, _partners(own, other, student, teacher), strict=True)
    ]


def _of_shared_kinds(
    own: list[list[str]], other: list[list[str]], student: Trace, teacher: Trace
) -> tuple[list[list[str]], list[list[str]]]:
    """The parts of both, without those of maps, or of tokens, where the other network has none of that kind."""
    kinds = {_axis(names, student) for names in own} & {_axis(names, teacher) for names in other}
    if not kinds:
        return own, other
    return (
        [names for names in own if _axis(names, student) in kinds],
        [names for names in other if _axis(names, teacher) in kinds],
    )


def _axis(names: list[str], trace: Trace) -> int:
    """How many axes the blocks of a part have: more than three are those of maps."""
    tensor = trace.tensor(names[0])
    return 3 if tensor is None else min(len(tensor.shape), 4)


def _joined(groups: list[list[str]], trace: Trace) -> list[str]:
    return sorted((name for group in groups for name in group), key=lambda name: trace.layer(name).order or 0)


def _partners(own: list[str], other: list[str], student: Trace, teacher: Trace) -> list[str]:
    """The teacher's block for each of the student's."""
    by_depth = evenly_spaced(len(own), other)
    own_by_size, other_by_size = _by_size(own, student), _by_size(other, teacher)
    shared = own_by_size.keys() & other_by_size.keys()
    # Else the teacher sees images of another size, or divides them otherwise.
    is_alike = 2 * sum(len(own_by_size[size]) for size in shared) >= len(own)
    if not is_alike or any(len(own_by_size[size]) > len(other_by_size[size]) for size in shared):
        return by_depth
    partners = dict(zip(own, by_depth, strict=True))
    for size, names in own_by_size.items():
        by_nearness = {abs(math.log(found / size)): found for found in other_by_size}
        nearest = by_nearness[min(by_nearness)]
        partners |= dict(zip(names, evenly_spaced(len(names), other_by_size[nearest]), strict=True))
    return [partners[name] for name in own]


def _by_size(names: list[str], trace: Trace) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in names:
        found.setdefault(trace.position_count(name), []).append(name)
    return found
