"""Pairs of layers, and what a traced forward says of each layer. Plain data; ``reading/tracer.py`` makes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["LayerPair", "LayerSpec", "Trace", "TracedLayer", "TracedTensor", "check_options", "is_int"]

INPUT = ":input"
#: Names that wrappers (DDP, torch.compile, FSDP, activation checkpointing) put into the names of what they wrap.
WRAPPER_NAMES = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


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
        check_options(self.weight, self.neuron_axis, self.select, f"LayerPair {self.student!r} -> {self.teacher!r}")
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


def is_int(value: Any) -> bool:
    """Whether a value is an integer, which a boolean is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_options(weight: Any, neuron_axis: Any, select: Any, where: str) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what cannot be an option of a pair."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"Expected `weight` of {where} to be a number, but got {weight!r}.")
    if not math.isfinite(weight) or weight <= 0:
        raise ValueError(f"Expected `weight` of {where} to be positive and finite, but got {weight!r}.")
    is_two_axes = isinstance(neuron_axis, (tuple, list)) and len(neuron_axis) == 2 and all(map(is_int, neuron_axis))
    if neuron_axis is not None and not is_int(neuron_axis) and not is_two_axes:
        raise TypeError(
            f"Expected `neuron_axis` of {where} to be an axis or (student axis, teacher axis), but got {neuron_axis!r}."
        )
    if select is not None and not isinstance(select, str) and not is_int(select):
        raise TypeError(f"Expected `select` of {where} to be a key or an index, but got {select!r}.")
