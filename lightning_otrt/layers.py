"""The names of layers: pairs, the grammar of ``layers=``, and what a traced forward says of each layer.

Everything here is plain data: nothing runs a model. :mod:`lightning_otrt.tracing` makes a :class:`Trace`, and
:func:`lightning_otrt.selection.resolve_layers` turns a specification and two traces into pairs.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

__all__ = ["LayerPair", "LayerSpec", "Trace", "TracedLayer", "TracedTensor", "check_names"]

INPUT = ":input"
WORDS = ("auto", "blocks", "matched", "penultimate")
#: Names that wrappers (DDP, torch.compile, FSDP, activation checkpointing) put into the names of what they wrap.
WRAPPER_NAMES = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_SHOWN = 20


@dataclass(frozen=True)
class LayerPair:
    """A student layer and the teacher layer its neurons are matched to.

    Args:
        student: Name, glob, ``"re:..."``, ``"name:input"``, ``"blocks"`` or ``"penultimate"`` in the student.
        teacher: The same in the teacher.
        weight: Share of this pair against the other pairs; only ratios matter.
        neuron_axis: Axis of the neurons in the output, or ``(student, teacher)`` axes; None follows from the modules.
        select: Key or index of the tensor, where a module returns a mapping or a tuple.

    Raises:
        TypeError: If a name is not a string, or an axis or selector is of the wrong type.
        ValueError: If the weight is not positive and finite.

    Example:
        >>> LayerPair("net.layer4", "layer4", weight=2.0)
        LayerPair(student='net.layer4', teacher='layer4', weight=2.0, neuron_axis=None, select=None)
    """

    student: str
    teacher: str
    weight: float = 1.0
    neuron_axis: int | tuple[int, int] | None = None
    select: str | int | None = None

    def __post_init__(self) -> None:
        """Validate, so that a wrong field is reported where it is written."""
        for side in ("student", "teacher"):
            name = getattr(self, side)
            if not isinstance(name, str):
                raise TypeError(f"Expected `{side}` of a LayerPair to be the name of a layer, but got {name!r}.")
        _check_options(self.weight, self.neuron_axis, self.select, f"LayerPair {self.student!r} -> {self.teacher!r}")
        if isinstance(self.neuron_axis, list):  # YAML has no tuples
            object.__setattr__(self, "neuron_axis", tuple(self.neuron_axis))


#: What ``layers=`` accepts; a list may mix all of its forms.
LayerSpec: TypeAlias = int | str | LayerPair | Mapping[Any, Any] | Sequence[Any]


@dataclass(frozen=True)
class TracedTensor:
    """A tensor that entered or left a layer.

    Args:
        shape: Its shape.
        dtype: Its dtype without the ``torch.``, such as ``"float32"``.
        is_floating: Whether the dtype is a real floating-point type.
        neuron_axis: Non-negative axis of the neurons, None where it is ambiguous.
        batch_axis: Axis of the samples: 0, or 1 for ``(T, B, C)``.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    is_floating: bool = True
    neuron_axis: int | None = None
    batch_axis: int = 0

    @property
    def positions(self) -> tuple[int, ...]:
        """Sizes of the axes that are neither samples nor neurons."""
        return tuple(n for axis, n in enumerate(self.shape) if axis not in (self.batch_axis, self.neuron_axis))


@dataclass(frozen=True)
class TracedLayer:
    """What one forward showed of one module.

    Args:
        name: Qualified name, without the prefixes of wrappers.
        kind: Type name.
        order: Place in the order of completion; None if the module did not run.
        calls: How often it ran.
        is_container: Whether it has child modules.
        role: ``"linear"``, ``"pointwise"`` (1x1 convolution), ``"conv"``, ``"pool"``, ``"dropout"``, ``"passive"`` (may
            follow a classification head) or ``""``.
        input: First positional tensor input.
        output: The output, where it is one tensor or a tuple with exactly one.
        output_kind: What came out, such as ``"Tensor"`` or ``"tuple(Tensor, None)"``; ``""`` if it did not run.
        parts: ``(key or index, tensor)`` where the output is a mapping or tuple: what ``select`` can choose.
        producer: Name of the layer whose output tensor is the input of this one.
        maker: Name of the layer that made the output: another one where a container hands on what a child made.
        gives_model_output: Whether its output tensor is (one of) the tensors that the whole model returns.
    """

    name: str
    kind: str = "Module"
    order: int | None = None
    calls: int = 0
    is_container: bool = False
    role: str = ""
    input: TracedTensor | None = None
    output: TracedTensor | None = None
    output_kind: str = ""
    parts: tuple[tuple[str | int, TracedTensor], ...] = ()
    producer: str | None = None
    maker: str | None = None
    gives_model_output: bool = False

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Shape of the first positional tensor input."""
        return self.input.shape if self.input else None

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """Shape of the output, None if it is not one tensor."""
        return self.output.shape if self.output else None

    @property
    def neuron_axis(self) -> int | None:
        """Axis of the neurons in the output, None if ambiguous."""
        return self.output.neuron_axis if self.output else None

    @property
    def input_neuron_axis(self) -> int | None:
        """Axis of the neurons in the input, None if ambiguous."""
        return self.input.neuron_axis if self.input else None

    @property
    def batch_axis(self) -> int:
        """Axis of the samples in the output."""
        return self.output.batch_axis if self.output else 0

    @property
    def is_recordable(self) -> bool:
        """Whether the output can be a representation: one call, one floating-point tensor of two or more axes."""
        return self.calls == 1 and self.output is not None and self.output.is_floating and len(self.output.shape) >= 2


@dataclass(frozen=True)
class Trace:
    """What one forward showed of a model.

    Args:
        layers: All modules of the model in the order of their definition, also those that did not run.
        root: Name of the module whose forward was traced, ``""`` for the whole model.
        aliases: ``(other name, name)`` of modules that are registered under several names.
        output_shapes: Shapes of the tensors that the root returned.
        batch_size: Size of the first axis of the first tensor input.
        input_is_image: Whether the first tensor input is a floating-point tensor of four axes.
        image_size: Height and width of that image.
        prefix_tokens: Number of class, distillation and register tokens that the model declares.
    """

    layers: tuple[TracedLayer, ...]
    root: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    output_shapes: tuple[tuple[int, ...], ...] = ()
    batch_size: int = 0
    input_is_image: bool = False
    image_size: tuple[int, int] | None = None
    prefix_tokens: int = 0

    def layer(self, name: str) -> TracedLayer:
        """The layer of that name or alias; ``":input"`` is ignored.

        Raises:
            KeyError: If there is none.
        """
        name = name.removesuffix(INPUT)
        name = dict(self.aliases).get(name, name)
        return {layer.name: layer for layer in self.layers}[name]

    def tensor(self, name: str, select: str | int | None = None) -> TracedTensor | None:
        """What a recording of ``name`` or ``"name:input"`` sees; None where that is not one tensor."""
        layer = self.layer(name)
        if name.endswith(INPUT):
            return layer.input
        if select is not None and layer.parts:
            return dict(layer.parts).get(select)
        return layer.output

    def recordable(self) -> tuple[TracedLayer, ...]:
        """The layers that indices count: in order of completion, without the root and a child that holds all of it.

        A LightningModule around a network thus counts as the network alone does.
        """
        ran = [layer for layer in self.layers if layer.calls and layer.name != self.root]

        def is_all(layer: TracedLayer) -> bool:
            inside, around = f"{layer.name}.", (f"{other.name}." for other in ran if other.is_container)
            outer = {name for name in around if inside.startswith(name)}
            return layer.is_container and all(
                other.name.startswith(inside) or f"{other.name}." in outer for other in ran
            )

        found = [layer for layer in ran if layer.is_recordable and not is_all(layer)]
        return tuple(sorted(found, key=lambda layer: layer.order or 0))

    def names(self) -> tuple[str, ...]:
        """All names a user may write, aliases included."""
        return (*(layer.name for layer in self.layers), *(alias for alias, _ in self.aliases))


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
    _check_options(entry.weight, entry.neuron_axis, entry.select, f"layer pair {entry}")
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


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_options(weight: Any, neuron_axis: Any, select: Any, where: str) -> None:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"Expected `weight` of {where} to be a number, but got {weight!r}.")
    if not math.isfinite(weight) or weight <= 0:
        raise ValueError(f"Expected `weight` of {where} to be positive and finite, but got {weight!r}.")
    is_two_axes = isinstance(neuron_axis, (tuple, list)) and len(neuron_axis) == 2 and all(map(_is_int, neuron_axis))
    if neuron_axis is not None and not _is_int(neuron_axis) and not is_two_axes:
        raise TypeError(
            f"Expected `neuron_axis` of {where} to be an axis or (student axis, teacher axis), but got {neuron_axis!r}."
        )
    if select is not None and not isinstance(select, str) and not _is_int(select):
        raise TypeError(f"Expected `select` of {where} to be a key or an index, but got {select!r}.")


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
        student_names: Names of the student's modules; see :func:`lightning_otrt.tracing.named_layers`.
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
