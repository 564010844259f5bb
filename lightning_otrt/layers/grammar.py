"""The grammar of ``layers=``: which forms are accepted, split into elements. Nothing here looks at a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lightning_otrt.checks import is_int, shown
from lightning_otrt.layers.pairs import LayerPair, LayerSpec, check_options

__all__ = ["WORDS", "LayerEntry", "only_words", "parse_layers", "written"]

#: Names that stand for a rule of ``layers/automatic.py`` or ``layers/head.py``.
WORDS = ("auto", "blocks", "matched", "penultimate")


@dataclass(frozen=True)
class LayerEntry:
    """One element of a specification; its names are not looked up yet."""

    student: str | int
    teacher: str | int
    weight: float = 1.0
    neuron_axis: int | tuple[int, int] | None = None
    select: str | int | None = None
    mask: str | tuple[str | None, str | None] | None = "auto"

    def __str__(self) -> str:
        """The element as the user may have written it."""
        return repr(self.student) if self.student == self.teacher else f"{self.student!r} -> {self.teacher!r}"

    def pair(self, student: str, teacher: str) -> LayerPair:
        """A pair of the two layers with the options of this element."""
        return LayerPair(student, teacher, self.weight, self.neuron_axis, self.select, self.mask)


def parse_layers(spec: LayerSpec) -> tuple[LayerEntry, ...]:
    """Split a specification into its elements.

    Raises:
        TypeError: If an element is none of the accepted forms.
        ValueError: If there is no element, or ``"auto"`` or ``"matched"`` stands on one side only.
    """
    entries = tuple(_parse(spec))
    if not entries:
        raise ValueError(
            f"Expected `layers` to name at least one layer pair, but got {shown(spec)}. Without a layer there is no "
            'term; pass {"student layer": "teacher layer"}, or "auto".'
        )
    for entry in entries:
        for word in ("auto", "matched"):
            if word in (entry.student, entry.teacher) and entry.student != entry.teacher:
                raise ValueError(
                    f'"{word}" chooses the layers of both sides at once, but got {entry}. Use "{word}" by itself.'
                )
    return entries


def written(name: str) -> str:
    """How the name of a module is written in ``layers=``: one that is called like a word would be read as that.

    Example:
        >>> written("blocks.0"), written("blocks")
        ('blocks.0', 're:blocks')
    """
    return f"re:{name}" if name in WORDS else name


def only_words(spec: LayerSpec) -> bool:
    """Whether a specification names no layer: it consists of words ("auto", "blocks", ...) and indices.

    Example:
        >>> only_words(["blocks", -1]), only_words(["blocks", "fc"])
        (True, False)
    """
    return all(
        isinstance(name, int) or name in WORDS
        for entry in parse_layers(spec)
        for name in (entry.student, entry.teacher)
    )


def _parse(spec: Any) -> list[LayerEntry]:
    if isinstance(spec, LayerPair):
        return [LayerEntry(spec.student, spec.teacher, spec.weight, spec.neuron_axis, spec.select, spec.mask)]
    if isinstance(spec, str) or is_int(spec):
        return [LayerEntry(spec, spec)]
    if isinstance(spec, Mapping):
        return _parse_mapping(spec)
    if isinstance(spec, Sequence) and not isinstance(spec, bytes):
        return [entry for element in spec for entry in _parse_element(element)]
    raise _wrong_form(spec)


def _parse_element(element: Any) -> list[LayerEntry]:
    if isinstance(element, Sequence) and not isinstance(element, (str, bytes)):
        if len(element) != 2:
            raise _wrong_form(element)
        return [LayerEntry(_name(element[0]), _name(element[1]))]
    return _parse(element)


def _parse_mapping(spec: Mapping[Any, Any]) -> list[LayerEntry]:
    if not {"student", "teacher"} <= set(spec):
        return [LayerEntry(_name(student), _name(teacher)) for student, teacher in spec.items()]
    known = [field.name for field in fields(LayerPair)]
    unknown = [key for key in spec if key not in known]
    if unknown:
        raise TypeError(f"Expected the fields of a layer pair to be among {known}, but got {unknown} in {dict(spec)}.")
    options = {key: value for key, value in spec.items() if key not in ("student", "teacher")}
    entry = LayerEntry(_name(spec["student"]), _name(spec["teacher"]), **options)
    check_options(entry.weight, entry.neuron_axis, entry.select, entry.mask, f"layer pair {entry}")
    return [entry]


def _name(value: Any) -> str | int:
    if isinstance(value, str) or is_int(value):
        return value
    raise _wrong_form(value)


def _wrong_form(value: Any) -> TypeError:
    return TypeError(
        "Expected an element of `layers` to be a name, an index, a pair (student, teacher), a LayerPair or a mapping "
        f"from student to teacher, but got {shown(value)} of type {type(value).__name__}."
    )
