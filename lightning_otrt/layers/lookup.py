"""How a name, glob or regex of a user is looked up among the names of a model, and the errors where it is not found."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

from lightning_otrt.layers.grammar import WORDS, LayerEntry, parse_layers
from lightning_otrt.layers.names import listed, unwrapped_name
from lightning_otrt.layers.pairs import INPUT, LayerPair, LayerSpec

__all__ = ["LayerNames", "check_names", "pair_up", "reject_duplicates"]

#: Names that an error lists before it says how many more there are.
_listed = partial(listed, at_most=20)


@dataclass(frozen=True)
class LayerNames:
    """The names of one side.

    Args:
        side: ``"student"`` or ``"teacher"``, for errors.
        names: Names of all modules.
        root: Module to which names may be relative; None: not known yet, any direct child may be it.
        kind: Type name of the model, for errors.
        tensors: Parameters and buffers by name, each with a description, to recognise one given in place of a layer.
    """

    side: str
    names: tuple[str, ...]
    root: str | None = ""
    kind: str = ""
    tensors: Mapping[str, str] = field(default_factory=dict)

    def find(self, selector: str, other: LayerNames) -> tuple[str, ...]:
        """The names that a name, glob or regex stands for, in order of definition.

        Args:
            selector: What the user wrote.
            other: The names of the other side, to notice that the sides are swapped.

        Raises:
            ValueError: If there is none, or the regex is invalid.
        """
        base = selector.removesuffix(INPUT)
        suffix = selector[len(base) :]
        if base == "":
            return ((self.root or "") + suffix,)
        found = self._matching(_matcher(base))
        if not found and not _is_pattern(base):
            found = self._matching(unwrapped_name(base).__eq__)
        if found:
            return tuple(name + suffix for name in found)
        raise self._nothing_matches(base) if _is_pattern(base) else self._missing(base, other)

    def _matching(self, matches: Callable[[str], bool]) -> list[str]:
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
            f"{what} {pattern!r} matches no layer of the {self._model()}. {how}. Its names are: {_listed(shown)}."
        )

    def _missing(self, name: str, other: LayerNames) -> ValueError:
        prefix = f"{self.root}." if self.root else ""
        for full in (name, prefix + name):
            if full in self.tensors:
                return ValueError(
                    f"{full!r} in the {self._model()} is a {self.tensors[full]}, not a module. Only a module has an "
                    f"output to record. Name the module that owns it: {full.rpartition('.')[0]!r}."
                )
        message = f"No layer {name!r} in the {self._model()}."
        relative = [known.removeprefix(prefix) for known in self.names]
        close = difflib.get_close_matches(name, dict.fromkeys([*self.names, *relative, *WORDS]), n=3)
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

    def _model(self) -> str:
        return f"{self.side} ({self.kind})" if self.kind else self.side


def check_names(spec: LayerSpec, student: LayerNames, teacher: LayerNames) -> None:
    """Check what can be checked before any forward: the grammar, and that every name exists.

    Words and indices need a trace and are not checked.

    Args:
        spec: What the user passed as ``layers``.
        student: Names of the student.
        teacher: Names of the teacher.

    Raises:
        TypeError: If an element of ``spec`` is none of the accepted forms.
        ValueError: If a name or pattern finds nothing, or the two sides differ in number.

    Example:
        >>> teacher = LayerNames("teacher", ("", "fc"))
        >>> check_names({"net.fc": "fc"}, LayerNames("student", ("", "net", "net.fc")), teacher)
        >>> check_names("fc2", LayerNames("student", ("", "fc1")), teacher)
        Traceback (most recent call last):
        ...
        ValueError: No layer 'fc2' in the student. Did you mean 'fc1'? Available at this depth: 'fc1'.
    """
    pairs = []
    for entry in parse_layers(spec):
        found = [
            None if isinstance(name, int) or name in WORDS else names.find(name, other)
            for name, names, other in ((entry.student, student, teacher), (entry.teacher, teacher, student))
        ]
        if found[0] is not None and found[1] is not None:
            pairs += pair_up(entry, found[0], found[1])
    reject_duplicates(pairs)


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
