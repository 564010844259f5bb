"""The option ``distillation``: how the teacher's logits become a term of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from lightning_otrt.checks import check_number, constructor_call, is_int, shown

__all__ = ["LogitDistillation", "as_distillation", "check_distillation"]

_WEIGHT = "It is the factor on the distillation of logits; 0 switches it off."


@dataclass(frozen=True)
class LogitDistillation:
    r"""Distillation of logits (arXiv 1503.02531): a second term of the loss, beside the transport of neurons.

    Logits are what both networks return in the forwards of a step: a tensor, ``logits`` of a Hugging Face output,
    ``"out"`` of a segmentation network of torchvision, or the first item of a tuple. So the teacher runs once for both
    terms. Where both have the same number of classes the term is

    .. math:: T^2 \sum_k p_k \log \frac{p_k}{q_k}, \quad p = \mathrm{softmax}(t / T), \quad q = \mathrm{softmax}(s / T)

    with the teacher's logits t and the student's s. It is averaged over samples, over the pixels of a segmentation, and
    over the tokens of sequences, padding left out. Maps of the teacher of another size are resized to the student's
    (bilinear).

    Where a sample has several labels, ``activation="sigmoid"`` compares the probabilities of each label instead: the
    same term for each label, with the two classes "yes" and "no", averaged over labels. It also serves a single logit.
    The softmax is wrong for labels and for a regression. So there is a warning if the first backward pass shows
    that the task's loss is not one of a softmax; ``activation="softmax"`` says that you want it all the same.

    Where the classes are others, the teacher's logits are regressed on what enters the student's last linear layer: by
    ridge, on running moments, so that there is nothing to train and no second head. The term is then 1 - R², with the
    map of the regression held fixed in its gradient.

    Args:
        weight: Factor on the term. The ``schedule`` of the transfer multiplies it too.
        temperature: T.
        select: Key or index of the logits, where the output holds several tensors; or ``(student, teacher)``.
        class_axis: Axis of the classes. None: 1 for ``(B, K)`` and ``(B, K, H, W)``; for three axes it follows from the
            modules that make the output, where these tell.
        features: Student layer, or ``"layer:input"``, on which the teacher's logits are regressed. None: what enters
            its last linear layer, and only where the numbers of classes differ. Name it where two networks have as many
            classes by chance.
        activation: ``"softmax"``, or ``"sigmoid"`` for networks that are trained with a binary cross-entropy. None: the
            softmax, with a look at the task.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the weight is negative, the temperature not positive, or the activation unknown.

    Example:
        >>> from lightning_otrt import LogitDistillation
        >>> LogitDistillation(0.5, temperature=2.0)
        LogitDistillation(weight=0.5, temperature=2.0)
    """

    weight: float = 1.0
    temperature: float = 4.0
    select: str | int | tuple[str | int | None, str | int | None] | None = None
    class_axis: int | None = None
    features: str | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        """Check the fields, so that a wrong one is reported where the user writes it."""
        check_number("weight", self.weight, _WEIGHT)
        check_number("temperature", self.temperature, "It divides the logits: 4 is usual, 1 leaves them as they are.")
        if self.temperature == 0:
            raise ValueError("Expected argument `temperature` to be positive, but got 0. 4 is usual.")
        if isinstance(self.select, list):  # YAML has no tuples
            object.__setattr__(self, "select", tuple(self.select))
        sides = self.select if isinstance(self.select, tuple) else (self.select, self.select)
        if len(sides) != 2 or not all(side is None or isinstance(side, str) or is_int(side) for side in sides):
            raise TypeError(
                "Expected argument `select` to be the key or the index of the logits, or a tuple (student, teacher) of "
                f"these, but got {shown(self.select)}."
            )
        if self.class_axis is not None and not is_int(self.class_axis):
            raise TypeError(f"Expected argument `class_axis` to be an axis or None, but got {shown(self.class_axis)}.")
        if self.activation not in (None, "softmax", "sigmoid"):
            raise ValueError(
                f"Expected argument `activation` to be 'softmax', 'sigmoid' or None, but got {shown(self.activation)}."
            )
        if self.features is not None and not isinstance(self.features, str):
            raise TypeError(
                f"Expected argument `features` to be the name of a student layer or None, but got "
                f"{shown(self.features)}."
            )

    @property
    def selects(self) -> tuple[str | int | None, str | int | None]:
        """Where the logits are in the outputs of student and teacher, as far as that is given."""
        return self.select if isinstance(self.select, tuple) else (self.select, self.select)

    def __repr__(self) -> str:
        """The constructor call, with the fields that differ from their defaults."""
        return constructor_call(self)


def as_distillation(value: float | LogitDistillation) -> LogitDistillation:
    """The option in full.

    Example:
        >>> as_distillation(0.5)
        LogitDistillation(weight=0.5)
    """
    return value if isinstance(value, LogitDistillation) else LogitDistillation(weight=value)


def check_distillation(value: Any) -> None:
    """Check the option as the user gives it.

    Raises:
        TypeError: If it is no number and no :class:`LogitDistillation`.
        ValueError: If it is negative or not finite.
    """
    if isinstance(value, LogitDistillation):
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            "Expected argument `distillation` to be the weight of the distillation of logits or "
            f"LogitDistillation(weight, temperature), but got {shown(value)} of type {type(value).__name__}."
        )
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"Expected argument `distillation` to be finite and not negative, but got {value}. {_WEIGHT}")
