"""Pairs of layers: what a user may pass as ``layers``, and how resolved pairs are saved. Plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from numbers import Real
from typing import Any, TypeAlias

from lightning_otrt.checks import constructor_call, is_int, shown

__all__ = [
    "INPUT",
    "LayerOptions",
    "LayerPair",
    "LayerSpec",
    "check_options",
    "pair_labels",
    "pairs_from_state",
    "pairs_to_state",
]

#: Suffix of a name that stands for what enters the layer.
INPUT = ":input"


@dataclass(frozen=True)
class LayerPair:
    """A student layer and the teacher layer its neurons are matched to.

    Args:
        student: Name, glob, ``"re:..."``, ``"name:input"``, ``"blocks"`` or ``"penultimate"`` in the student.
        teacher: The same in the teacher.
        weight: Share of this pair against the other pairs; only ratios matter.
        neuron_axis: Axis of the neurons in the output, or ``(student, teacher)`` axes; None: taken from the traced
            modules.
        select: Key or index of the tensor, where a module returns a mapping or a tuple.
        mask: The padding mask of both layers, or ``(student, teacher)``: ``"auto"`` finds the one of each layer's
            sequence, None reads padding too, ``"name"`` is an argument of the forward of the network's root, or of a
            module around the layer, that is true at valid tokens, ``"~name"`` one that is true at padding.

    Raises:
        TypeError: If a name is not a string, or an axis or selector is of the wrong type.
        ValueError: If the weight is not positive and finite.

    Example:
        >>> LayerPair("net.layer4", "layer4", weight=2.0)
        LayerPair('net.layer4', 'layer4', weight=2.0)
    """

    student: str
    teacher: str
    weight: float = 1.0
    neuron_axis: int | tuple[int, int] | None = None
    select: str | int | None = None
    mask: str | tuple[str | None, str | None] | None = "auto"

    def __post_init__(self) -> None:
        """Check the fields, so that a wrong one is reported where the user writes it."""
        for side in ("student", "teacher"):
            name = getattr(self, side)
            if not isinstance(name, str):
                raise TypeError(f"Expected `{side}` of a LayerPair to be the name of a layer, but got {shown(name)}.")
        check_options(
            self.weight, self.neuron_axis, self.select, self.mask, f"LayerPair {self.student!r} -> {self.teacher!r}"
        )
        if isinstance(self.neuron_axis, list):  # YAML has no tuples
            object.__setattr__(self, "neuron_axis", tuple(self.neuron_axis))
        if isinstance(self.mask, list):
            object.__setattr__(self, "mask", tuple(self.mask))

    def __repr__(self) -> str:
        """The constructor call, with the fields that differ from their defaults."""
        return constructor_call(self)

    @property
    def axes(self) -> tuple[int | None, int | None]:
        """Axes of the neurons in the student's and in the teacher's output, as far as they are given."""
        return self.neuron_axis if isinstance(self.neuron_axis, tuple) else (self.neuron_axis, self.neuron_axis)

    @property
    def masks(self) -> tuple[str | None, str | None]:
        """The masks of the student and of the teacher."""
        return self.mask if isinstance(self.mask, tuple) else (self.mask, self.mask)


#: What ``layers=`` accepts; a list may mix all of these forms.
LayerSpec: TypeAlias = int | str | LayerPair | Mapping[Any, Any] | Sequence[Any]


@dataclass(frozen=True)
class LayerOptions:
    """What a user passed about the layers that are matched.

    Args:
        layers: See ``RepresentationTransfer``.
        student_root: See ``RepresentationTransfer``.
        grid: Positions kept along each axis of a feature map.
        plan: Kind of plan; ``"auto"`` is chosen with the pairs.
    """

    layers: LayerSpec
    student_root: str | None = None
    grid: int | None = None
    plan: str = ""


def check_options(weight: Any, neuron_axis: Any, select: Any, mask: Any, where: str) -> None:
    """Check the options of a pair.

    Args:
        weight: Must be a positive finite number.
        neuron_axis: Must be an axis, two axes or None.
        select: Must be a key, an index or None.
        mask: Must be a name, ``"auto"``, None, or two of these.
        where: How errors name the pair.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If the weight is not positive and finite.
    """
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise TypeError(f"Expected `weight` of {where} to be a number, but got {shown(weight)}.")
    if not math.isfinite(weight) or weight <= 0:
        raise ValueError(f"Expected `weight` of {where} to be positive and finite, but got {shown(weight)}.")
    is_two_axes = isinstance(neuron_axis, (tuple, list)) and len(neuron_axis) == 2 and all(map(is_int, neuron_axis))
    if neuron_axis is not None and not is_int(neuron_axis) and not is_two_axes:
        raise TypeError(
            f"Expected `neuron_axis` of {where} to be an axis or (student axis, teacher axis), but got "
            f"{shown(neuron_axis)}."
        )
    if select is not None and not isinstance(select, str) and not is_int(select):
        raise TypeError(f"Expected `select` of {where} to be a key or an index, but got {shown(select)}.")
    masks = mask if isinstance(mask, (tuple, list)) and len(mask) == 2 else (mask,)
    if not all(name is None or (isinstance(name, str) and name.strip("~")) for name in masks):
        raise TypeError(
            f"Expected `mask` of {where} to be 'auto', None, the name of an argument, '~name', or a tuple (student, "
            f"teacher) of these, but got {shown(mask)}."
        )


def pair_labels(pairs: Sequence[LayerPair]) -> tuple[str, ...]:
    """A name for each pair, no two alike: its student layer, and as much more as tells it from other pairs.

    Example:
        >>> pair_labels([LayerPair("a", "x"), LayerPair("b", "x"), LayerPair("b", "y")])
        ('a', 'b-x', 'b-y')
        >>> pair_labels([LayerPair("a", "x", select=0), LayerPair("a", "x", select=1)])
        ('a-x-0', 'a-x-1')
    """
    short = [pair.student for pair in pairs]
    longer = [f"{pair.student}-{pair.teacher}" for pair in pairs]
    longest = [f"{name}-{pair.select}" for name, pair in zip(longer, pairs, strict=True)]
    labels = [
        next((name for name, names in ((a, short), (b, longer)) if names.count(name) == 1), c)
        for a, b, c in zip(short, longer, longest, strict=True)
    ]
    # The name of a layer may have a "-", too.
    return tuple(label if labels.count(label) == 1 else f"{label}-{number}" for number, label in enumerate(labels))


def pairs_to_state(pairs: Sequence[LayerPair]) -> list[tuple[Any, ...]]:
    """Resolved pairs as plain data, which ``torch.load`` reads with ``weights_only=True``.

    Example:
        >>> pairs_to_state([LayerPair("a", "b", neuron_axis=(1, 1))])
        [('a', 'b', 1.0, (1, 1), None, 'auto')]
    """
    return [astuple(replace(pair, weight=float(pair.weight))) for pair in pairs]


def pairs_from_state(state: Sequence[Sequence[Any]]) -> tuple[LayerPair, ...]:
    """The pairs that :func:`pairs_to_state` was given.

    Example:
        >>> pairs_from_state([("a", "b", 1.0, (1, 1), None, "auto")])
        (LayerPair('a', 'b', neuron_axis=(1, 1)),)
    """
    return tuple(LayerPair(*pair) for pair in state)
