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
    groups = block_groups(student), block_groups(teacher)
    if len(groups[0]) != len(groups[1]):
        groups = [_joined(groups[0], student)], [_joined(groups[1], teacher)]
    return [
        pair
        for own, other in zip(*groups, strict=True)
        for pair in zip(own, _partners(own, other, student, teacher), strict=True)
    ]


def _joined(groups: list[list[str]], trace: Trace) -> list[str]:
    return sorted((name for group in groups for name in group), key=lambda name: trace.layer(name).order or 0)


def _partners(own: list[str], other: list[str], student: Trace, teacher: Trace) -> list[str]:
    """The teacher's block for each of the student's."""
    by_depth = evenly_spaced(len(own), other)
    sizes, other_sizes = ([_size(name, trace) for name in names] for names, trace in ((own, student), (other, teacher)))
    if len(set(sizes)) < len(sizes) or len(set(other_sizes)) < len(other_sizes):
        return by_depth  # several blocks of one resolution: it does not tell them apart
    partner = dict(zip(other_sizes, other, strict=True))
    shared = [size for size in sizes if size in partner]
    if 2 * len(shared) < len(sizes):
        return by_depth  # the teacher sees images of another size, or divides them otherwise
    return [
        partner[size]
        if size in partner
        else partner[min(other_sizes, key=lambda s, size=size: abs(math.log(s / size)))]
        for size in sizes
    ]


def _size(name: str, trace: Trace) -> int:
    tensor = trace.tensor(name)
    return math.prod(tensor.positions) if tensor is not None else 0
