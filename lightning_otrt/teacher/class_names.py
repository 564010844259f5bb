"""The names that two networks give their classes: softened classes can be compared only in one order.

Models of Hugging Face keep them as ``config.id2label``, and checkpoints of one task do differ in their order.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_otrt.notices import warn

__all__ = ["check_class_names", "class_names"]

#: What a config holds where nobody has named the classes.
UNNAMED = "label_"


def class_names(model: nn.Module, count: int | None = None) -> tuple[str, ...] | None:
    """The names of the classes by index, in lower case where they are then still different.

    Args:
        model: The network whose output are the logits.
        count: The number of its classes, where it is known.

    Returns:
        None where nobody has named them, where parts of the network name different ones, or where what holds the names
        has no layer of that width: the body of a checkpoint keeps those of the head that it once had.

    Example:
        >>> from types import SimpleNamespace
        >>> model = nn.Linear(4, 2)
        >>> model.config = SimpleNamespace(id2label={0: "Negative", 1: "Positive"})
        >>> class_names(nn.Sequential(model))
        ('negative', 'positive')
    """
    found = {names for module in model.modules() if (names := _own_names(module)) and count in (None, len(names))}
    return found.pop() if len(found) == 1 else None


def check_class_names(student: nn.Module, teacher: nn.Module, counts: tuple[int | None, int | None]) -> None:
    """Compare the names of the classes whose probabilities are compared.

    Args:
        student: The network whose output are the student's logits.
        teacher: Likewise.
        counts: The numbers of classes, where they are known.

    Raises:
        ValueError: If both have the same names in another order.
    """
    own, theirs = class_names(student, counts[0]), class_names(teacher, counts[1])
    if own is None or theirs is None or own == theirs or len(own) != len(theirs):
        return
    first = next(index for index, (mine, other) in enumerate(zip(own, theirs, strict=True)) if mine != other)
    named = f"class {first} is {own[first]!r} for the student and {theirs[first]!r} for the teacher"
    if sorted(own) == sorted(theirs):
        raise ValueError(
            "Distillation of logits compares class by class, but student and teacher have their classes in another "
            f"order: by `config.id2label` {named}. Make the student with the `id2label` of the teacher, and turn the "
            "labels of the data into its order. Where a config is wrong, correct its `id2label`."
        )
    warn(
        "Distillation of logits compares class by class, but student and teacher name their classes otherwise: by "
        f"`config.id2label` {named}. If these are the same classes, give both configs the same `id2label`. If not, let "
        "the teacher's logits be regressed: distillation=LogitDistillation(features='name of a student layer').",
    )


def _own_names(module: nn.Module) -> tuple[str, ...] | None:
    try:
        names = getattr(getattr(module, "config", None), "id2label", None)
    except Exception:  # a property of the user's that fails says nothing of classes
        return None
    if not isinstance(names, Mapping) or not names:
        return None
    # From JSON the indices are words.
    by_index = {str(index): str(name).strip() for index, name in names.items()}
    if set(by_index) != set(map(str, range(len(names)))):
        return None
    ordered = [by_index[str(index)] for index in range(len(names))]
    # Backbones of transformers have lists of stages under these names.
    found = (getattr(layer, "out_features", getattr(layer, "out_channels", None)) for layer in module.modules())
    widths = {width for width in found if isinstance(width, int)}
    lower = [name.lower() for name in ordered]
    if all(name.startswith(UNNAMED) for name in lower) or len(names) not in widths:
        return None
    return tuple(lower if len(set(lower)) == len(lower) else ordered)
