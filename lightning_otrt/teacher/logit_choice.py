"""The choice of the logits that are read and compared, and how, from traces of both networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_otrt.distillation import LogitDistillation
from lightning_otrt.layers.names import child_names, named_layers
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.recordable import chosen_axis, recorded_tensor
from lightning_otrt.layers.trace import Trace, TracedTensor
from lightning_otrt.layers.traced_logits import head_input, other_head, traced_class_axis, traced_logits
from lightning_otrt.notices import warn
from lightning_otrt.reading.hooks.logit_reader import LogitReader, TracedLogits, logit_masks, logit_reader
from lightning_otrt.reading.hooks.readers import TracedRead, recorded_layer
from lightning_otrt.reading.hooks.recorder import RecordedLayer
from lightning_otrt.reading.masks.warnings import warn_of_unused_masks
from lightning_otrt.reading.pairing import Pairing
from lightning_otrt.teacher.class_names import check_class_names

__all__ = ["LogitChoice", "choose_logits", "teacher_reader"]


@dataclass(frozen=True)
class LogitChoice:
    """Which logits are read, and how they are compared.

    Attributes:
        student: Reads the logits of the student; None before the choice, and where the modules were let go.
        teacher: The same of the teacher.
        features: What to record of the student for a regression.
        traced: The student's logits in the trace, where it shows them.
        is_regression: Whether the teacher's logits are regressed, as far as the traces tell.
        is_matched: Whether the transport of a pair reaches the logits, whose gradient is then not that of the task.
        regression: What is regressed on what, plain values by what they are; None where nothing is.
        note: What is compared, for the log.
    """

    student: LogitReader | None = None
    teacher: LogitReader | None = None
    features: RecordedLayer | None = None
    traced: TracedTensor | None = None
    is_regression: bool = False
    is_matched: bool = False
    regression: dict[str, Any] | None = None
    note: str = ""

    def without_modules(self) -> LogitChoice:
        """The same without the modules of both networks.

        Example:
            >>> LogitChoice(note="Distillation").without_modules().note
            'Distillation'
        """
        return replace(self, student=None, teacher=None, features=None)


def choose_logits(
    option: LogitDistillation, grid: int | None, pairing: Pairing, student: nn.Module, teacher: nn.Module
) -> LogitChoice:
    """Take from the traces what to read, and how.

    Args:
        option: What the user passed.
        grid: Positions kept along each axis of a map; for a regression.
        pairing: The pairs of layers, with the traces of both networks.
        student: The student.
        teacher: The teacher.

    Returns:
        The choice. Both networks stay as they are.

    Raises:
        ValueError: If the layer that the user named for a regression does not exist or cannot be read, or if both
            networks have the same classes in another order.
    """
    of_student = _reader(option, pairing, 0, student)
    of_teacher = teacher_reader(option, pairing, teacher)
    sides = [_traced_logits(option, pairing, place) for place in (0, 1)]
    _warn_of_features(option, pairing)
    counts = []
    for place, of in enumerate(sides):
        if not _reads_padding(pairing, place):
            warn_of_unused_masks(of.side, {"logits": logit_masks(of)})
        counts.append(_classes(of, option))
    differ = None not in counts and counts[0] != counts[1]
    is_regression = differ or option.features is not None
    recorded = [pair.student for pair in pairing.pairs if not pair.student.endswith(INPUT)]
    is_matched = any(pairing.student.layer(name).gives_model_output for name in recorded)
    features = _find_features(option, grid, pairing.student, named_layers(student)) if is_regression else None
    if not is_regression:
        roots = named_layers(student)[pairing.student.root], named_layers(teacher)[pairing.teacher.root]
        check_class_names(*roots, (counts[0], counts[1]))
    return LogitChoice(
        student=of_student,
        teacher=of_teacher,
        features=features,
        traced=sides[0].tensor,
        is_regression=is_regression,
        is_matched=is_matched,
        regression=_regressed_on(option, grid, features, of_teacher),
        note=_described(option, counts, features, is_regression=is_regression),
    )


def teacher_reader(option: LogitDistillation, pairing: Pairing, teacher: nn.Module) -> LogitReader:
    """What reads the logits of this module, the teacher or a copy of it.

    Args:
        option: What the user passed.
        pairing: The pairs of layers, with the traces of both networks.
        teacher: The module.
    """
    return _reader(option, pairing, 1, teacher)


def _reader(option: LogitDistillation, pairing: Pairing, place: int, model: nn.Module) -> LogitReader:
    return logit_reader(_traced_logits(option, pairing, place), named_layers(model), option.class_axis)


def _traced_logits(option: LogitDistillation, pairing: Pairing, place: int) -> TracedLogits:
    """Those of one side: of the student, 0, or of the teacher, 1."""
    side, trace = (("student", pairing.student), ("teacher", pairing.teacher))[place]
    return TracedLogits(side, trace, option.selects[place], _named_masks(pairing, place))


def _warn_of_features(option: LogitDistillation, pairing: Pairing) -> None:
    """Warn where the first item of an output is taken for its logits, and looks like features."""
    selects, traces = option.selects, (pairing.student, pairing.teacher)
    others = [other_head(trace, select) for trace, select in zip(traces, selects, strict=True)]
    if others == [None, None]:
        return
    sides = [side for side, other in zip(("student", "teacher"), others, strict=True) if other is not None]
    made = next(other for other in others if other is not None)
    features, logits = (
        tuple(select if other is None else key for select, other, key in zip(selects, others, keys, strict=True))
        for keys in (others, (0, 0))
    )
    warn(
        f"The first item of what the {' and the '.join(sides)} return{'s' * (len(sides) == 1)} is taken for the "
        f"logits, but no linear layer made it, and one made the item {made!r}. Where the first are features, pass "
        f"distillation=LogitDistillation(select={features}), for student and teacher; where they are the logits, "
        f"select={logits}.",
    )


def _find_features(
    option: LogitDistillation, grid: int | None, trace: Trace, modules: dict[str, nn.Module]
) -> RecordedLayer | None:
    name = option.features
    if name is None:
        logits = traced_logits(trace, option.selects[0])
        name = None if logits is None else head_input(trace, logits)
        if name is None:
            return None
    bare = name.removesuffix(INPUT)
    if bare not in modules:
        inside = f"{trace.root}.{name}" if trace.root else name
        if inside.removesuffix(INPUT) not in modules:
            raise ValueError(
                f"Expected `features` to name a layer of the student, but there is no {bare!r}. Children of its "
                f"root: {child_names(modules[trace.root])}."
            )
        name = inside
    axis = chosen_axis("student", trace, name, None, recorded_tensor("student", trace, name, None))
    return recorded_layer(TracedRead("student", trace, name, axis), modules, grid)


def _regressed_on(
    option: LogitDistillation, grid: int | None, features: RecordedLayer | None, teacher: LogitReader
) -> dict[str, Any] | None:
    if features is None:
        return None
    return {
        "features": features.name,
        "activation": "sigmoid" if option.activation == "sigmoid" else "softmax",
        "select": repr(teacher.select),
        "class_axis": teacher.class_axis,
        "grid": grid,
    }


def _described(
    option: LogitDistillation, counts: Sequence[int | None], features: RecordedLayer | None, *, is_regression: bool
) -> str:
    if features is not None:
        return f"Distillation: the teacher's logits, regressed on {features.name!r} of the student"
    if is_regression:  # the first step says which option names the layer
        return "Distillation: the teacher's logits, regressed on a layer of the student that `features` has to name"
    count = "the" if counts[0] is None else str(counts[0])
    classes = "labels, each by itself," if option.activation == "sigmoid" else "classes"
    return f"Distillation: T² KL of {count} {classes} at temperature {option.temperature:g}"


def _named_masks(pairing: Pairing, place: int) -> tuple[str, ...]:
    """What the pairs name as masks of one side."""
    named = (pair.masks[place] for pair in pairing.pairs)
    return tuple(dict.fromkeys(name for name in named if name not in (None, "auto")))


def _reads_padding(pairing: Pairing, place: int) -> bool:
    """Whether the pairs say that there is no padding on one side, or that it is to be read."""
    return bool(pairing.pairs) and all(pair.masks[place] is None for pair in pairing.pairs)


def _classes(of: TracedLogits, option: LogitDistillation) -> int | None:
    """The number of classes of a traced network, None where the trace does not show it."""
    logits = of.tensor
    if logits is None or len(logits.shape) < 2:
        return None
    axis = option.class_axis if option.class_axis is not None else traced_class_axis(of.trace, logits)
    if axis is None:
        axis = 1 if len(logits.shape) != 3 else None
    return None if axis is None or not -len(logits.shape) <= axis < len(logits.shape) else logits.shape[axis]
