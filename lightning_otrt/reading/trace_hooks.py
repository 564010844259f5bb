"""The hooks of one traced forward of a model, and what they note of each module that runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import TracedMask
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import TracedLayer, TracedTensor
from lightning_otrt.reading.containers import all_tensors, as_container
from lightning_otrt.reading.masks.search import MaskSearch
from lightning_otrt.reading.masks.shown_padding import ShownPadding
from lightning_otrt.reading.neurons.outputs import describe, output_items, packed_mask, sequence_output
from lightning_otrt.reading.torch_internals import is_in_backward, is_in_functional_transform
from lightning_otrt.reading.traced.arguments import bound_arguments, entered_tensor
from lightning_otrt.reading.traced.axes import Frame, TracedAxes, has_children, shape_of
from lightning_otrt.reading.traced.batch_facts import is_rectified
from lightning_otrt.reading.traced.calls import ModuleCall
from lightning_otrt.reading.traced.flow import Flow
from lightning_otrt.reading.traced.module_types import role_of

__all__ = ["TraceHooks"]


class TraceHooks:
    """The hooks of one traced forward, and what they noted.

    Args:
        inputs: The tensors that the forward gets.
        axes: Tells along which axes the samples and neurons lie.
        values: Whether to look at values. This waits for the device.

    Attributes:
        padding: The padding that the calls showed.
        flow: From which layers tensors came.
        picked_positions: By layer, the positions of the samples that its tensors have.
    """

    def __init__(self, inputs: Sequence[Tensor], axes: TracedAxes, values: bool) -> None:
        self._values = values
        self._inputs = {id(tensor) for tensor in inputs}
        self._axes = axes
        self._search = MaskSearch(inputs)
        self.padding = ShownPadding()
        self.flow = Flow()
        self.picked_positions: dict[str, tuple[tuple[int, ...], ...]] = {}
        self._layers: dict[str, TracedLayer] = {}
        self._outputs: dict[str, list[Callable[[], Tensor | None]]] = {}
        self._completed = 0
        self._has_inner: list[bool] = []  # of the modules that are running

    def enter(self, call: ModuleCall) -> None:
        """The call of a method, inside of which all modules run."""
        self.padding.note(call)
        self._axes.enter(call, None, takes_model_input=False)

    def before_forward(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        # A forward that takes a gradient within it runs checkpointed layers once more, which is no second call.
        if is_in_backward():
            return
        taken = bound_arguments(module, args, kwargs)
        starts = any(id(value) in self._inputs for key, value in taken.items() if not key.endswith("mask"))
        self._axes.enter(ModuleCall(name, module, taken), entered_tensor(args, kwargs), takes_model_input=starts)
        self._has_inner.append(False)

    def after_forward(self, name: str, module: nn.Module, args: tuple[Any, ...], returned: Any) -> None:
        """Forward hook."""
        if is_in_backward():
            return
        frame = self._axes.leave(module)
        output = sequence_output(module, returned)
        tensors = [(key, value) for key, value in output_items(output) if isinstance(value, Tensor)]
        around = [running.call for running in reversed(self._axes.running)]
        masks = self._note_masks(frame, around, [value for _, value in tensors])
        length = next((mask.shape[1] for mask in masks if mask.shape is not None), None)
        traced = tuple((key, self._traced(frame, key, value, length)) for key, value in tensors)
        is_single = len(traced) == 1 and not isinstance(as_container(output), Mapping)
        known = self._layers.get(name)
        made_by = self._axes.source(tensors[0][1]) if is_single and has_children(module) else None
        reached_by = self._note_flow(name, frame, returned)
        self._note_picks(name, [value for _, value in tensors])
        self._note_picks(name + INPUT, [] if frame.input is None else [frame.input])
        self._layers[name] = TracedLayer(
            name=name,
            kind=type(module).__name__,
            order=self._completed,
            calls=known.calls + 1 if known else 1,
            input=None if frame.input is None else self._traced_input(frame, frame.input, length),
            output=traced[0][1] if is_single else None,
            output_kind=describe(output),
            parts=() if isinstance(returned, Tensor) else traced,
            fields=getattr(returned, "_fields", ()) if isinstance(returned, tuple) else (),
            input_shapes=tuple(
                tuple(value.shape) for value in all_tensors(frame.call.arguments) if not value.is_nested
            ),
            input_from=frame.source.layer if frame.source else None,
            output_from=made_by.layer if made_by is not None else name,
            takes_model_input=frame.takes_model_input,
            reached_by=reached_by | known.reached_by if known else reached_by,
            masks=masks,
            looks_at_memory=any(call.memories for call in (frame.call, *around)),
            in_transform=is_in_functional_transform(),
            has_own_mask=packed_mask(returned) is not None or any(value.is_nested for _, value in tensors),
        )
        # Of all its calls: a head that ran twice may return the output of the first.
        self._outputs.setdefault(name, []).extend(weakref.ref(value) for _, value in tensors)
        self._completed += 1
        for (_, value), (_, facts) in zip(tensors, traced, strict=True):
            self._axes.note(name, frame, value, facts)

    def layer(self, name: str, module: nn.Module, returned: Sequence[Tensor]) -> TracedLayer:
        """All that is known of a module after the forward, which returned these tensors."""
        layer = self._without_doubtful_axes(self._layers.get(name, TracedLayer(name, kind=type(module).__name__)))
        outputs = [reference() for reference in self._outputs.get(name, [])]
        is_returned = any(output is tensor for output in outputs if output is not None for tensor in returned)
        return replace(
            layer,
            is_container=has_children(module),
            role=role_of(module),
            gives_model_output=is_returned,
            has_weights=next(module.parameters(), None) is not None,
            is_graph=isinstance(module, (torch.fx.GraphModule, torch.jit.ScriptModule)),
        )

    def _note_masks(
        self, frame: Frame, around: Sequence[ModuleCall], outputs: Sequence[Tensor]
    ) -> tuple[TracedMask, ...]:
        """Note the padding that a call shows and the masks that it passes on; its own masks, if it has sequences."""
        self.padding.note(frame.call, around)
        if not has_children(frame.module):
            self._search.pass_on(frame.call, outputs, around)
        if any(value.dim() == 3 for value in (frame.input, *outputs) if value is not None):
            return self._search.masks([frame.call, *around])
        return ()

    def _note_flow(self, name: str, frame: Frame, returned: Any) -> frozenset[str]:
        """Note where the tensors of a call come from; the layers whose outputs reach its arguments."""
        reached_by = self.flow.sources(all_tensors(frame.call.arguments))
        if not self._has_inner.pop():
            has_weights = next(frame.module.parameters(), None) is not None
            self.flow.enter(all_tensors(returned), {name} if has_weights else {name, *reached_by})
        # What computes the weights of a layer, such as a spectral norm, is no layer inside of it.
        if self._has_inner and "parametrizations" not in name.split("."):
            self._has_inner[-1] = True
        return reached_by

    def _note_picks(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Note which positions of the samples what a layer gives, or gets, has."""
        found = [picked for tensor in tensors if (picked := self.flow.picks.positions(tensor))]
        if found:
            self.picked_positions[name] = found[0]

    def _without_doubtful_axes(self, layer: TracedLayer) -> TracedLayer:
        if layer.name + INPUT in self._axes.doubtful and layer.input is not None:
            layer = replace(layer, input=replace(layer.input, neuron_axis=None))
        if layer.name in self._axes.doubtful and layer.output is not None:
            parts = tuple((key, replace(part, neuron_axis=None)) for key, part in layer.parts)
            layer = replace(layer, output=replace(layer.output, neuron_axis=None), parts=parts)
        return layer

    def _traced_input(self, frame: Frame, value: Tensor, length: int | None) -> TracedTensor:
        shape = shape_of(value, length)
        return self._facts(value, shape, frame.input_axis, self._axes.batch_axis(frame, value, shape))

    def _traced(self, frame: Frame, key: str | int, value: Tensor, length: int | None) -> TracedTensor:
        shape = shape_of(value, length)
        axis = self._axes.neuron_axis(frame, key, value, shape)
        facts = self._facts(value, shape, axis, self._axes.batch_axis(frame, value, shape))
        source = self._axes.source(value) if has_children(frame.module) else None
        return facts if source is None else replace(facts, made_by=source.layer)

    def _facts(self, value: Tensor, shape: tuple[int, ...], neuron_axis: int | None, batch_axis: int) -> TracedTensor:
        dtype, is_floating = str(value.dtype).removeprefix("torch."), value.is_floating_point()
        looks = self._values and is_floating and value.numel() and not is_in_functional_transform()
        rectified = is_rectified(value) if looks else None
        return TracedTensor(shape, dtype, is_floating, neuron_axis, batch_axis, rectified)
