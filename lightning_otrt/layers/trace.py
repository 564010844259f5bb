"""The record of one traced forward of a model. Plain data; ``reading/tracer.py`` makes it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_otrt.layers.mask_sources import TracedMask
from lightning_otrt.layers.names import ancestors
from lightning_otrt.layers.pairs import INPUT

__all__ = ["LINEAR", "Trace", "TracedLayer", "TracedTensor"]

#: Roles of linear maps, see :class:`TracedLayer`.
LINEAR = ("linear", "pointwise", "conv")


@dataclass(frozen=True)
class TracedTensor:
    """A tensor that entered or left a layer.

    Args:
        shape: Its shape.
        dtype: Its dtype without the ``torch.``, such as ``"float32"``.
        is_floating: Whether the dtype is a real floating-point type.
        neuron_axis: Non-negative axis of the neurons, None where it is ambiguous.
        batch_axis: Axis of the samples: 0, or 1 for ``(T, B, C)``.
        is_rectified: Whether its values look like those behind a nonlinearity that cuts off negative ones; None where
            the trace was not asked to look.
        made_by: Name of the layer that made an output of a container, where no code computed on it since; else None.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    is_floating: bool = True
    neuron_axis: int | None = None
    batch_axis: int = 0
    is_rectified: bool | None = None
    made_by: str | None = None

    @property
    def positions(self) -> tuple[int, ...]:
        """Sizes of the axes that are neither samples nor neurons."""
        return tuple(n for axis, n in enumerate(self.shape) if axis not in (self.batch_axis, self.neuron_axis))

    @property
    def position_count(self) -> int:
        """The number of positions; 1 for a vector."""
        return math.prod(self.positions)


@dataclass(frozen=True)
class TracedLayer:
    """What one forward showed of one module.

    Args:
        name: Qualified name, without the prefixes of wrappers.
        kind: Type name.
        order: Place in the order of completion; None if the module did not run.
        calls: How often it ran.
        is_container: Whether it has child modules.
        role: ``"linear"``, ``"pointwise"`` (1x1 convolution), ``"conv"``, ``"pool"``, ``"dropout"``, ``"recurrent"``,
            ``"passive"`` (may follow a classification head) or ``""``.
        input: First positional tensor input.
        input_shapes: Shapes of all tensors that enter it.
        output: The output, where it is one tensor or a tuple with exactly one.
        output_kind: The output in words, such as ``"float32 (4, 6)"``; ``""`` if the module did not run.
        parts: ``(key or index, tensor)`` where the output is a mapping or tuple: what ``select`` can choose.
        fields: The names of the items, where the output is a named tuple; ``parts`` has their indices.
        input_from: Name of the layer whose output tensor is the input of this one.
        output_from: Name of the layer that made the output: a child where a container returns what this child made.
        gives_model_output: Whether its output tensor is (one of) the tensors that the whole model returns.
        reached_by: Names of the layers whose outputs enter it, also through code and through layers without weights.
        takes_model_input: Whether a tensor that enters the whole model, other than a mask, enters it unchanged.
        masks: Padding masks of its sequence, the nearest first.
        looks_at_memory: Whether it is, or is inside of, a module whose sequence looks at another one.
        has_own_mask: Whether what it returns tells its own padding: packed sequences and nested tensors do.
        has_weights: Whether it has parameters, its own or those of modules inside.
        in_transform: Whether it ran inside a transform of ``torch.func``, which its tensors cannot leave.
        is_graph: Whether its forward is a graph of torch.fx, torch.export or TorchScript, in which modules inside may
            not run as modules.
    """

    name: str
    kind: str = "Module"
    order: int | None = None
    calls: int = 0
    is_container: bool = False
    role: str = ""
    input: TracedTensor | None = None
    input_shapes: tuple[tuple[int, ...], ...] = ()
    output: TracedTensor | None = None
    output_kind: str = ""
    parts: tuple[tuple[str | int, TracedTensor], ...] = ()
    fields: tuple[str, ...] = ()
    input_from: str | None = None
    output_from: str | None = None
    gives_model_output: bool = False
    reached_by: frozenset[str] = frozenset()
    takes_model_input: bool = False
    masks: tuple[TracedMask, ...] = ()
    looks_at_memory: bool = False
    has_own_mask: bool = False
    has_weights: bool = True
    in_transform: bool = False
    is_graph: bool = False

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """Shape of the output, None if it is not one tensor."""
        return self.output.shape if self.output else None

    @property
    def neuron_axis(self) -> int | None:
        """Axis of the neurons in the output, None if ambiguous."""
        return self.output.neuron_axis if self.output else None

    @property
    def batch_axis(self) -> int:
        """Axis of the samples in the output."""
        return self.output.batch_axis if self.output else 0

    @property
    def makes_weights(self) -> bool:
        """Whether it computes the weights of another layer, as a spectral norm does, and is none of the network."""
        return "parametrizations" in self.name.split(".")

    @property
    def is_recordable(self) -> bool:
        """Whether the output can be a representation: one call, one floating-point tensor of two or more axes."""
        if self.in_transform or self.makes_weights or self.calls != 1 or self.output is None:
            return False
        return self.output.is_floating and len(self.output.shape) >= 2


@dataclass(frozen=True)
class Trace:
    """What one forward showed of a model.

    Args:
        layers: All modules of the model in the order of their definition, also those that did not run.
        root: Name of the module whose forward was traced, ``""`` for the whole model.
        aliases: ``(other name, name)`` of modules that are registered under several names.
        output_shapes: Shapes of the floating-point tensors that the root returned.
        batch_size: Number of samples, on which inputs and outputs agree; 0 where no axis is that of the samples.
        sample_axis: Axis of the samples in the sequences that enter it, where modules inside have a ``batch_first``;
            else None.
        input_samples: Numbers of samples of its inputs of two or more axes: two towers may have different ones.
        prefix_tokens: Number of class, distillation and register tokens that the model declares.
        arguments: The arguments of the root's forward, as far as they may be masks.
        shown_padding: What the values of arguments, and the ids that embeddings get, show of padding.
        learned_tokens: Numbers of rows of parameters that may be learned tokens, such as queries and latent vectors.
        guessed_axes: Tensors whose neuron axis is that of the layers inside of their module, although axes of the same
            size may have changed places behind these: name of the module, key in its output, and the last such layer.
        draws_random: Whether the forward drew random numbers although it ran in evaluation mode.
        is_random: Whether what it computes depends on them.
        may_reorder: Whether the forward put the rows of a tensor with a row for each sample into other places.
        reordered: Names of layers that hold the samples in another order than the inputs; ``":input"`` for what enters.
        unclear_axes: Names of layers of which nothing tells the axis of the samples.
        unordered_tokens: Names of layers with a token for each position of a map, which are not shown to lie row by
            row; ``":input"`` for what enters.
        chosen_rows: Names of layers whose rows are not shown to be the samples, or all their positions.
        picked_positions: By the names of layers whose positions the network picks by scores of its own, those of each
            sample; ``":input"`` for what enters.
    """

    layers: tuple[TracedLayer, ...]
    root: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    output_shapes: tuple[tuple[int, ...], ...] = ()
    batch_size: int = 0
    sample_axis: int | None = None
    input_samples: frozenset[int] = frozenset()
    prefix_tokens: int = 0
    arguments: tuple[TracedMask, ...] = ()
    shown_padding: tuple[TracedMask, ...] = ()
    learned_tokens: frozenset[int] = frozenset()
    guessed_axes: tuple[tuple[str, str | int, str], ...] = ()
    draws_random: bool = False
    is_random: bool = False
    may_reorder: bool = False
    reordered: tuple[str, ...] = ()
    unclear_axes: tuple[str, ...] = ()
    unordered_tokens: tuple[str, ...] = ()
    chosen_rows: tuple[str, ...] = ()
    picked_positions: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    @property
    def shows_output(self) -> bool:
        """Whether the root returned a tensor that may be logits or a map: no loss alone, no predicted classes."""
        return any(len(shape) >= 2 for shape in self.output_shapes)

    def is_sample_count(self, size: int) -> bool:
        """Whether a size is the number of samples, of the whole batch or of one of several towers."""
        return size == self.batch_size or size in self.input_samples

    def layer(self, name: str) -> TracedLayer:
        """The layer of that name or alias; ``":input"`` is ignored.

        Raises:
            KeyError: If there is none.
        """
        name = name.removesuffix(INPUT)
        name = dict(self.aliases).get(name, name)
        return self._by_name[name]

    def around(self, name: str) -> list[TracedLayer]:
        """The layers around the one of that name, the outermost first; without the whole model."""
        return [self._by_name[outer] for outer in ancestors(name) if outer in self._by_name]

    @functools.cached_property
    def _by_name(self) -> dict[str, TracedLayer]:
        return {layer.name: layer for layer in self.layers}

    def tensor(self, name: str, select: str | int | None = None) -> TracedTensor | None:
        """What a recording of ``name`` or ``"name:input"`` reads; None where that is not one tensor."""
        layer = self.layer(name)
        if name.endswith(INPUT):
            return layer.input
        if select is not None and layer.parts:
            return dict(layer.parts).get(select)
        return layer.output

    def position_count(self, name: str) -> int:
        """The number of positions of what a recording of ``name`` reads; 0 where that is not one tensor."""
        tensor = self.tensor(name)
        return 0 if tensor is None else tensor.position_count

    def recordable(self) -> tuple[TracedLayer, ...]:
        """The layers that an index counts, in order of completion.

        Left out are the root and a container that holds every other layer. So a LightningModule around a network has
        the same indices as the network alone.
        """
        ran = [layer for layer in self.layers if layer.calls and layer.name != self.root]
        containers = [f"{layer.name}." for layer in ran if layer.is_container]

        def holds_all(layer: TracedLayer) -> bool:
            inside = f"{layer.name}."
            around = {container for container in containers if inside.startswith(container)}
            return layer.is_container and all(
                other.name.startswith(inside) or f"{other.name}." in around for other in ran
            )

        found = [layer for layer in ran if layer.is_recordable and not holds_all(layer)]
        return tuple(sorted(found, key=lambda layer: layer.order or 0))

    def names(self) -> tuple[str, ...]:
        """All names a user may write, aliases included."""
        return (*(layer.name for layer in self.layers), *(alias for alias, _ in self.aliases))
