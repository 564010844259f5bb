"""The axes of neurons and samples of the tensors in a traced forward, and which layer made each of them.

The type of a module tells the axis of its neurons, else the layer that made the tensor, else the layers inside and
around it. ``tracer.py`` runs the forward.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import Tensor, nn

from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import TracedTensor
from lightning_otrt.reading.neurons.nested import pad_nested
from lightning_otrt.reading.traced.batch_facts import is_sequence_first
from lightning_otrt.reading.traced.calls import ModuleCall
from lightning_otrt.reading.traced.module_types import axis_of_type, is_elementwise, is_normalisation, is_torch_norm

__all__ = ["Frame", "ShownAxes", "Source", "TracedAxes", "has_children", "shape_of"]

#: Neuron axes, None where not known, by the name of a module and the key in its output.
ShownAxes: TypeAlias = Mapping[tuple[str, str | int], int | None]


@dataclass
class Frame:
    """A module that is running.

    Attributes:
        call: The module with its arguments.
        input: Its first positional tensor input.
        input_axis: Axis of the neurons in the input, None while unknown.
        source: Where the input came from.
        takes_model_input: Whether an input of the whole model enters it, masks aside.
        votes: ``(shape, neuron axis)`` of the outputs of inner modules whose types tell the axis.
        votes_of_norms: The same of normalisations over the last axis, which may be that of time behind a convolution.
        last_voter: Name of the inner module that voted last.
    """

    call: ModuleCall
    input: Tensor | None = None
    input_axis: int | None = None
    source: Source | None = None
    takes_model_input: bool = False
    votes: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    votes_of_norms: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    last_voter: str | None = None

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.call.module


@dataclass
class Source:
    """Which layer made a tensor. The reference is weak, since a trace must not keep activations alive.

    Attributes:
        keeps_layout: Whether the layer keeps the layout of its input.
        before: Where its input came from.
        names: Names of the layers that return the tensor: this one, and those around it.
    """

    tensor: Callable[[], Tensor | None]
    layer: str
    neuron_axis: int | None
    batch_axis: int
    keeps_layout: bool = False
    before: Source | None = None
    names: list[str] = field(default_factory=list)


class TracedAxes:
    """What is known of the axes of tensors at a moment of the forward.

    Args:
        samples: Number of samples in the batch.
        batch_first: A module that takes the samples first, whatever stands inside of it.
        shown: Neuron axes that a probe showed.

    Attributes:
        running: The modules that are running, from the outermost to the innermost.
        guessed: See :attr:`~lightning_otrt.layers.trace.Trace.guessed_axes`.
        doubtful: Names of layers whose axis was that of a normalisation, where a later layer shows another one;
            ``":input"`` for what entered.
    """

    def __init__(self, samples: int, batch_first: nn.Module | None = None, shown: ShownAxes | None = None) -> None:
        self.running: list[Frame] = []
        self.guessed: dict[tuple[str, str | int], str] = {}
        self.doubtful: set[str] = set()
        self._shown = shown or {}
        self._samples, self._batch_first = samples, batch_first
        self._sources: dict[int, Source] = {}
        self._takes_sequence_first = functools.cache(is_sequence_first)  # looked up for each tensor inside a module

    def enter(self, call: ModuleCall, tensor: Tensor | None, *, takes_model_input: bool) -> None:
        """A module starts to run on a tensor."""
        source = self.source(tensor)
        axis = None
        if tensor is not None:
            shape = shape_of(tensor, None)
            axis = self._axis_of_type(call.module, tensor, shape)
            if axis is None and source is not None:
                axis = source.neuron_axis
            elif axis is not None and not is_torch_norm(call.module):
                self._doubt(source, axis, shape)
            for frame in self.running:
                # Where a container passes its input on, the layer that gets it tells the axis of the neurons.
                if frame.input is tensor and frame.input_axis is None:
                    frame.input_axis = axis
        self.running.append(Frame(call, tensor, axis, source, takes_model_input))

    def leave(self, module: nn.Module) -> Frame:
        """A module has run."""
        frame = self.running.pop()
        while frame.module is not module:  # an inner forward raised, and its caller went on
            frame = self.running.pop()
        return frame

    def source(self, tensor: Tensor | None) -> Source | None:
        """Which layer made a tensor, None if none is known."""
        source = self._sources.get(id(tensor))
        return source if source is not None and source.tensor() is tensor else None

    def note(self, name: str, frame: Frame, value: Tensor, facts: TracedTensor) -> None:
        """Remember where a tensor came from, and let a module of known type vote on the axes of those around it."""
        module, source = frame.module, frame.source
        if axis_of_type(module, facts.shape) is not None and facts.neuron_axis is not None:
            for frame in self.running:
                votes = frame.votes_of_norms if is_torch_norm(module) else frame.votes
                votes.append((facts.shape, facts.neuron_axis))
                frame.last_voter = frame.last_voter if is_torch_norm(module) else name
        known = self.source(value)
        if known is not None and has_children(module):  # the container returns what its last child made
            made = replace(known, neuron_axis=facts.neuron_axis, batch_axis=facts.batch_axis)
        else:
            keeps_layout = is_elementwise(module) or is_torch_norm(module)
            made = Source(weakref.ref(value), name, facts.neuron_axis, facts.batch_axis, keeps_layout, source)
        made.names.append(name)
        self._sources[id(value)] = made

    def neuron_axis(self, frame: Frame, key: str | int, value: Tensor, shape: tuple[int, ...]) -> int | None:
        """The axis by the module's type, the layer that made the tensor, the layers inside, or the input.

        Where the layers inside only let guess, a probe decides.
        """
        module, place = frame.module, (frame.call.name, key)
        by_type = self._axis_of_type(module, frame.input, shape)
        if by_type is not None or (is_torch_norm(module) and len(shape) > 2):
            return by_type
        source = self.source(value)
        if source is not None and source.neuron_axis is not None:
            return source.neuron_axis
        votes = _votes(frame, shape)
        if not votes:  # branches that were concatenated along the neurons
            known = (*frame.votes, *frame.votes_of_norms)
            votes = {axis for voted, axis in known if _without(voted, axis) == _without(shape, axis)}
        if not votes and is_normalisation(module):  # what runs around it
            votes = {axis for outer in self.running for axis in _votes(outer, shape)}
        keeps_shape = frame.input is not None and not frame.input.is_nested and tuple(frame.input.shape) == shape
        if votes:
            # Where two axes have one size, a module that transposes what it returns looks like one that does not.
            if has_children(module) and any(_is_a_guess(shape, axis) for axis in votes):
                if place in self._shown:
                    # A layer that mixes positions has these along the axis of its neurons. So what enters has to agree.
                    may_mix = frame.input is not None and frame.input.dim() == len(shape)
                    axis = self._shown[place]
                    return None if may_mix and frame.input_axis != axis else axis
                if frame.last_voter is not None:
                    self.guessed[place] = frame.last_voter
            return votes.pop() if len(votes) == 1 else None
        if has_children(module) and (axes := _axes_of_reshaped(frame, shape)):
            if len(axes) == 1 or place in self._shown:
                return self._shown.get(place, axes[0])
            if frame.last_voter is not None:
                self.guessed[place] = frame.last_voter
            return None
        if not has_children(module) and keeps_shape and frame.source is not None:
            axis = frame.source.neuron_axis
            # A layer of unknown type may permute. Its shape shows that, unless another axis has the same size.
            keeps_layout = is_elementwise(module) or is_normalisation(module)
            if axis is not None and (keeps_layout or shape.count(shape[axis]) == 1):
                return axis
        return None

    def _axis_of_type(self, module: nn.Module, entered: Tensor | None, shape: tuple[int, ...]) -> int | None:
        """The axis by the module's type.

        A normalisation over the last axis may be one over the times of ``(B, C, T)``. Then the axis is that of the
        layer which made its input, or that of the layers around it where they agree. Where two axes have the same size,
        it is not known, unless the input shows that it was transposed.
        """
        axis = axis_of_type(module, shape)
        if axis is None or len(shape) < 3 or not is_torch_norm(module):
            return axis
        source = self.source(entered)
        if source is not None and source.neuron_axis is not None:
            return source.neuron_axis
        around = self._around(shape)
        if len(around) != 1 or axis in around:
            return axis
        if _has_distinct_sizes(shape):
            return around.pop()
        is_transposed = entered is not None and not entered.is_nested and entered.stride(-1) != 1
        return axis if is_transposed else None

    def _doubt(self, source: Source | None, axis: int, shape: tuple[int, ...]) -> None:
        """Where a layer of another axis gets what a normalisation made, and no layer around has the axis of that one.

        It may have normalised over times, or the later layer may mix tokens, as a convolution with one channel for each
        of them does.
        """
        if self._around(shape) - {axis}:
            return
        while source is not None and source.keeps_layout and source.neuron_axis not in (None, axis):
            self.doubtful.update((*source.names, source.layer + INPUT))
            source.neuron_axis, source = None, source.before

    def _around(self, shape: tuple[int, ...]) -> set[int]:
        """The axes of layers inside the running modules that returned a tensor of this shape; normalisations aside."""
        return {axis for outer in self.running for voted, axis in outer.votes if voted == shape}

    def batch_axis(self, frame: Frame, value: Tensor, shape: tuple[int, ...]) -> int:
        """The axis of the samples of a ``(B, T, C)`` or ``(T, B, C)`` tensor, by `batch_first` or by its sizes."""
        if value.dim() != 3 or value.is_nested:
            return 0
        for running in (frame.module, *(outer.module for outer in reversed(self.running))):
            if running is self._batch_first:
                return 0
            sequence_first = self._takes_sequence_first(running)
            if sequence_first is not None:
                return int(sequence_first)
        source = self.source(value) or frame.source
        if source is not None and source.batch_axis == 1:
            return 1
        return 1 if shape[0] != self._samples and shape[1] == self._samples else 0


def has_children(module: nn.Module) -> bool:
    """Whether there are modules inside of it."""
    return next(module.children(), None) is not None


def shape_of(value: Tensor, length: int | None) -> tuple[int, ...]:
    """The shape of a tensor; that of a nested one, as it is padded to the length of the mask."""
    return tuple((pad_nested(value, length)[0] if value.is_nested and value.dim() == 3 else value).shape)


def _has_distinct_sizes(shape: tuple[int, ...]) -> bool:
    sizes = [size for size in shape[1:] if size > 1]  # axes of one element may change places unseen
    return len(set(sizes)) == len(sizes)


def _is_a_guess(shape: tuple[int, ...], axis: int) -> bool:
    """Whether an axis has the size of another one, so that the neurons may lie along that one."""
    return axis < len(shape) and shape[axis] > 1 and shape[1:].count(shape[axis]) > 1


def _votes(frame: Frame, shape: tuple[int, ...]) -> set[int]:
    """The axes that inner modules tell for a shape; normalisations where no other one does, or sizes are alike."""
    votes = {axis for voted, axis in frame.votes if voted == shape}
    if votes and _has_distinct_sizes(shape):
        return votes
    return votes | {axis for voted, axis in frame.votes_of_norms if voted == shape}


def _axes_of_reshaped(frame: Frame, shape: tuple[int, ...]) -> list[int]:
    """The axes that may hold the neurons of what the last inner layer made, where code has split or joined its axes.

    So rows of patches ``(B * channels, N, C)`` become ``(B, channels, N, C)``.
    """
    voted, axis = next(reversed([*frame.votes_of_norms, *frame.votes]), ((), 0))
    if not voted or len(voted) == len(shape) or math.prod(voted) != math.prod(shape):
        return []
    return [place for place, size in enumerate(shape) if place and size == voted[axis]]


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], -1, *shape[axis + 1 :])
