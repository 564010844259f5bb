"""The grammar of ``layers=``: what may stand there, and how a user's names are looked up among those of a model.

Nothing here runs a model; ``resolve_layers`` turns a specification and two traces into pairs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from lightning_otrt.layers.pairs import INPUT, WRAPPER_NAMES, LayerPair, LayerSpec, check_options

__all__ = ["WORDS", "LayerEntry", "LayerNames", "check_names", "pair_up", "parse_layers", "reject_duplicates"]

WORDS = ("auto", "blocks", "matched", "penultimate")
_SHOWN = 20


@dataclass(frozen=True)
class LayerEntry:
    """One element of a specification, its names not yet looked up."""

    student: str | int
    teacher: str | int
    weight: float = 1.0
    neuron_axis: int | tuple[int, int] | None = None
    select: str | int | None = None

    def __str__(self) -> str:
        """The element as the user may have written it."""
        return repr(self.student) if self.student == self.teacher else f"{self.student!r} -> {self.teacher!r}"

    def pair(self, student: str, teacher: str) -> LayerPair:
        """The pair of two names that this element stands for."""
        return LayerPair(student, teacher, self.weight, self.neuron_axis, self.select)


def parse_layers(spec: LayerSpec) -> tuple[LayerEntry, ...]:
    """Split a specification into its elements, without looking at any model.

    Raises:
        TypeError: If an element is none of the accepted forms.
        ValueError: If there is no element, or ``"auto"`` or ``"matched"`` stands on one side only.
    """
    entries = tuple(_parse(spec))
    if not entries:
        raise ValueError(
            f"Expected `layers` to name at least one layer pair, but got {spec!r}. Without a layer there is no term; "
            'pass {"student layer": "teacher layer"}, or "auto".'
        )
    for entry in entries:
        for word in ("auto", "matched"):
            if word in (entry.student, entry.teacher) and entry.student != entry.teacher:
                raise ValueError(
                    f'"{word}" chooses the layers of both sides at once, but got {entry}. Use "{word}" by itself.'
                )
    return entries


def _parse(spec: Any) -> list[LayerEntry]:
    if isinstance(spec, LayerPair):
        return [LayerEntry(spec.student, spec.teacher, spec.weight, spec.neuron_axis, spec.select)]
    if isinstance(spec, (str, int)) and not isinstance(spec, bool):
        return [LayerEntry(spec, spec)]
    if isinstance(spec, Mapping):
        return _parse_mapping(spec)
    if isinstance(spec, Sequence) and not isinstance(spec, (str, bytes)):
        return [entry for element in spec for entry in _parse_element(element)]
    raise _wrong_form(spec)


def _parse_element(element: Any) -> list[LayerEntry]:
    if isinstance(element, Sequence) and not isinstance(element, (str, bytes)):
        if len(element) != 2:
            raise _wrong_form(element)
        return [LayerEntry(_name(element[0]), _name(element[1]))]
    return _parse(element)


def _parse_mapping(spec: Mapping[Any, Any]) -> list[LayerEntry]:
    known = [entry.name for entry in fields(LayerPair)]
    if not {"student", "teacher"} <= set(spec):
        return [LayerEntry(_name(student), _name(teacher)) for student, teacher in spec.items()]
    unknown = [key for key in spec if key not in known]
    if unknown:
        raise TypeError(f"Expected the fields of a layer pair to be among {known}, but got {unknown} in {dict(spec)}.")
    options = {key: value for key, value in spec.items() if key not in ("student", "teacher")}
    entry = LayerEntry(_name(spec["student"]), _name(spec["teacher"]), **options)
    check_options(entry.weight, entry.neuron_axis, entry.select, f"layer pair {entry}")
    return [entry]


def _name(value: Any) -> str | int:
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return value
    raise _wrong_form(value)


def _wrong_form(value: Any) -> TypeError:
    return TypeError(
        "Expected an element of `layers` to be a name, an index, a pair (student, teacher), a LayerPair or a mapping "
        f"from student to teacher, but got {value!r} of type {type(value).__name__}."
    )


@dataclass(frozen=True)
class LayerNames:
    """The names of one side, and how a user's name is looked up among them."""

    side: str
    names: tuple[str, ...]
    root: str | None = ""
    kind: str = ""
    tensors: Mapping[str, str] = field(default_factory=dict)

    def find(self, selector: str, other: LayerNames) -> tuple[str, ...]:
        """The names that a name, glob or regex stands for, in order of definition.

        Raises:
            ValueError: If there is none, or the regex is invalid.
        """
        base = selector.removesuffix(INPUT)
        suffix = selector[len(base) :]
        if base == "":
            return ((self.root or "") + suffix,)
        found = self._matches(_matcher(base))
        if not found and not _is_pattern(base):
            found = self._matches(_without_wrappers(base).__eq__)
        if found:
            return tuple(name + suffix for name in found)
        raise self._nothing_matches(base) if _is_pattern(base) else self._missing(base, other)

    def _matches(self, matches: Callable[[str], bool]) -> list[str]:
        # A student root that is not known yet can only be told apart later, so that any direct child may be it.
        roots = [name for name in self.names if name and "." not in name] if self.root is None else [self.root]
        for prefix in ["", *(f"{root}." for root in roots if root)]:
            found = [n for n in self.names if n != "" and n.startswith(prefix) and matches(n[len(prefix) :])]
            if found:
                return found
        return []

    def _nothing_matches(self, pattern: str) -> ValueError:
        what = "Regex" if pattern.startswith("re:") else "Pattern"
        how = "A regex must match the whole name" if what == "Regex" else "`*` and `?` do not match across dots"
        shown = [name for name in self.names if name]
        return ValueError(
            f"{what} {pattern!r} matches no layer of the {self._whole()}. {how}. Its names are: {_listed(shown)}."
        )

    def _missing(self, name: str, other: LayerNames) -> ValueError:
        prefix = f"{self.root}." if self.root else ""
        for full in (name, prefix + name):
            if full in self.tensors:
                return ValueError(
                    f"{full!r} in the {self._whole()} is a {self.tensors[full]}, not a module. Only a module has an "
                    f"output to record. Name the module that owns it: {full.rpartition('.')[0]!r}."
                )
        message = f"No layer {name!r} in the {self._whole()}."
        relative = [known.removeprefix(prefix) for known in self.names]
        close = difflib.get_close_matches(name, dict.fromkeys([*self.names, *relative]), n=3)
        if close:
            message += f" Did you mean {' or '.join(map(repr, close))}?"
        if other.names and name in other.names:
            message += (
                f" This name exists in the {other.side}: pairs are student -> teacher, the two sides may be swapped."
            )
        parent = max(self._existing_parent(name), self._existing_parent(prefix + name), key=len)
        siblings = [known for known in self.names if known and known.rpartition(".")[0] == parent]
        return ValueError(f"{message} Available at this depth: {_listed(siblings)}.")

    def _existing_parent(self, name: str) -> str:
        parent = name.rpartition(".")[0]
        return parent if not parent or parent in self.names else self._existing_parent(parent)

    def _whole(self) -> str:
        return f"{self.side} ({self.kind})" if self.kind else self.side


def _is_pattern(name: str) -> bool:
    return name.startswith("re:") or any(sign in name for sign in "*?[")


def _matcher(name: str) -> Callable[[str], bool]:
    if name.startswith("re:"):
        try:
            regex = re.compile(name[3:])
        except re.error as error:
            raise ValueError(
                f"Invalid regex {name[3:]!r} in `layers`: {error.msg} at position {error.pos}. Correct the expression, "
                "or leave out 're:' for a plain name or glob."
            ) from None
        return lambda candidate: regex.fullmatch(candidate) is not None
    if not _is_pattern(name):
        return name.__eq__
    parts = name.split(".")

    def matches(candidate: str) -> bool:
        # Level by level, so that "layer*" means layer1 to layer4 and not everything inside them.
        names = candidate.split(".")
        return len(names) == len(parts) and all(map(fnmatchcase, names, parts))

    return matches


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_SHOWN])) or "none"
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def pair_up(entry: LayerEntry, student: Sequence[str], teacher: Sequence[str]) -> list[LayerPair]:
    """Pair two lists of names in order.

    Raises:
        ValueError: If they differ in length.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"{entry} names {len(student)} student layers but {len(teacher)} teacher layers, which cannot be paired in "
            f"order. Student: {_listed(student)}. Teacher: {_listed(teacher)}. Narrow a pattern, or give the pairs."
        )
    return [entry.pair(*names) for names in zip(student, teacher, strict=True)]


def reject_duplicates(pairs: Sequence[LayerPair]) -> None:
    """Raise ``ValueError`` where one pair is named twice, which would silently double its weight."""
    seen = set()
    for pair in pairs:
        key = (pair.student, pair.teacher, pair.select)
        if key in seen:
            raise ValueError(
                f"The pair {pair.student!r} -> {pair.teacher!r} is named twice in `layers`, which would double its "
                "weight. Remove one, or give the pair a `weight`."
            )
        seen.add(key)


def check_names(
    spec: LayerSpec,
    student_names: Sequence[str],
    teacher_names: Sequence[str],
    student_root: str | None = None,
    *,
    teacher_root: str = "",
    student_kind: str = "",
    teacher_kind: str = "",
    student_tensors: Mapping[str, str] | None = None,
    teacher_tensors: Mapping[str, str] | None = None,
) -> None:
    """Check all that can be checked before any forward: the grammar, and that every name exists.

    Words and indices need a trace and pass.

    Args:
        spec: What the user gave as ``layers``.
        student_names: Names of the student's modules; see :func:`lightning_otrt.reading.tracer.named_layers`.
        teacher_names: Names of the teacher's modules.
        student_root: Module to which names may be relative; None while it is not known, then any child may be it.
        teacher_root: The same for the teacher.
        student_kind: Type name of the student, for errors.
        teacher_kind: Type name of the teacher.
        student_tensors: Names of parameters and buffers with what they are, to recognise one given for a module.
        teacher_tensors: The same for the teacher.

    Raises:
        TypeError: If an element of ``spec`` is none of the accepted forms.
        ValueError: If a name or pattern finds nothing, or the two sides differ in number.

    Example:
        >>> check_names({"net.fc": "fc"}, ["", "net", "net.fc"], ["", "fc"])
        >>> check_names("fc2", ["", "fc1"], ["", "fc1"])
        Traceback (most recent call last):
        ...
        ValueError: No layer 'fc2' in the student. Did you mean 'fc1'? Available at this depth: 'fc1'.
    """
    student = LayerNames("student", tuple(student_names), student_root, student_kind, tensors=student_tensors or {})
    teacher = LayerNames("teacher", tuple(teacher_names), teacher_root, teacher_kind, tensors=teacher_tensors or {})
    pairs = []
    for entry in parse_layers(spec):
        found = [
            None if isinstance(name, int) or name in WORDS else names.find(name, other)
            for name, names, other in ((entry.student, student, teacher), (entry.teacher, teacher, student))
        ]
        if found[0] is not None and found[1] is not None:
            pairs += pair_up(entry, found[0], found[1])
    reject_duplicates(pairs)
