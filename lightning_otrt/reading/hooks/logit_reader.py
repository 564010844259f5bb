"""From what a network returns to its logits ``(B, K, *positions)``, with the mask of their padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_otrt.layers.mask_sources import LayerMasks, MaskSource, choose_masks
from lightning_otrt.layers.model_output import output_layers
from lightning_otrt.layers.trace import Trace, TracedTensor
from lightning_otrt.layers.traced_logits import logit_key, traced_class_axis, traced_logits
from lightning_otrt.reading.containers import as_container
from lightning_otrt.reading.hooks.note_hooks import mask_key
from lightning_otrt.reading.masks.layer_masks import flat_mask, named_masks, with_unread
from lightning_otrt.reading.masks.values import fit_mask
from lightning_otrt.reading.neurons.outputs import describe, output_items
from lightning_otrt.reading.neurons.pooling import widened, widened_copy

__all__ = ["LogitReader", "TracedLogits", "logit_masks", "logit_reader", "select_logits"]


def select_logits(output: Any, select: str | int | None, where: str) -> Tensor:
    """The logits in what a network returned.

    Args:
        output: A tensor, or something that holds one.
        select: Key or index of the tensor; None: ``"logits"``, ``"out"`` or the first of a tuple.
        where: How errors name the network.

    Raises:
        TypeError: If there are none, or they are no tensor of two or more axes.

    Example:
        >>> import torch
        >>> select_logits({"logits": torch.zeros(8, 3), "loss": None}, None, "student").shape
        torch.Size([8, 3])
    """
    found = output
    if not isinstance(output, Tensor):
        output = as_container(output)
        items = dict(output_items(output)) if isinstance(output, (Mapping, tuple, list)) else {}
        # By name first: a named tuple has both.
        name = "logits" if select is None else select
        key = logit_key(items) if select is None else select
        found = items.get(name, getattr(output, name, None)) if isinstance(name, str) else None
        found = items.get(key) if found is None and key is not None else found
    if isinstance(found, Tensor) and found.is_floating_point() and found.dim() >= 2 and not found.is_nested:
        return found
    if isinstance(found, Tensor) and found.is_floating_point() and found.dim() == 1:
        raise TypeError(
            f"Distillation needs the logits of the {where}, a tensor (B, K, ...), but got one number for each sample, "
            f"of shape {tuple(found.shape)}. Return them as (B, 1), as by `logits.unsqueeze(1)`. Then pass "
            "LogitDistillation(activation='sigmoid') if a binary cross-entropy trains them, or regress the teacher's "
            "output on a layer of the student with LogitDistillation(features='name of the layer')."
        )
    searched = "" if select is None else f" with nothing usable at select={select!r}"
    raise TypeError(
        f"Distillation needs the logits of the {where}, a floating-point tensor (B, K, ...), but it returned "
        f"{describe(output)}{searched}. Logits are what it returns, its `logits` (Hugging Face), its 'out' "
        "(segmentation of torchvision) or the first item of a tuple. Name the key or the index of another tensor with "
        "LogitDistillation(select=...), return the logits from `forward`, or, where another module of the student "
        "returns them, name that as `student_root`."
    )


@dataclass(frozen=True)
class LogitReader:
    """Reads the logits of one network.

    Args:
        side: ``"student"`` or ``"teacher"``.
        where: How errors name the network.
        select: See :func:`select_logits`.
        class_axis: Axis of the classes, where it is given or known from a trace.
        batch_axis: Axis of the samples.
        masks: Where the padding mask may come from, the nearest first, with the modules that get it.
    """

    side: str
    where: str
    select: str | int | None = None
    class_axis: int | None = None
    batch_axis: int = 0
    masks: tuple[tuple[MaskSource, nn.Module], ...] = ()

    def returned(self, output: Any) -> tuple[Tensor, int]:
        """The logits as the network returned them, and the axis of the classes.

        Args:
            output: What the network returned.

        Raises:
            TypeError: If there are no logits.
            ValueError: If it is not known which axis is that of the classes.
        """
        logits = select_logits(output, self.select, self.where)
        if hasattr(logits, "device_mesh"):
            raise TypeError(
                f"The logits of the {self.where} are a DTensor, whose classes are spread over processes. Distillation "
                "needs a plain tensor: gather them (`output_layouts=Replicate()`, `use_local_output=True`)."
            )
        return logits, class_axis(logits, self.class_axis, self.where)

    def __call__(self, output: Any, noted: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """The logits ``(B, K, *positions)`` in float32 or wider, and their mask ``(B, T)``, true at valid positions.

        Args:
            output: What the network returned; see :meth:`returned`.
            noted: The masks of its forward, by the key of their source.
        """
        logits, axis = self.returned(output)
        if self.batch_axis == 1 and logits.dim() == 3:
            logits = logits.transpose(0, 1)
            axis = axis if axis == 2 else 1 - axis
        # A copy of the student's: what comes after the network may write to them in place.
        logits = (widened_copy if self.side == "student" else widened)(logits.movedim(axis, 1))
        return logits, self._mask(logits, noted) if logits.dim() == 3 else None

    def _mask(self, logits: Tensor, noted: Mapping[str, Tensor | None]) -> Tensor | None:
        for source, module in self.masks:
            mask = noted.get(mask_key(self.side, source))
            fitted = None if mask is None else fit_mask(mask, logits.shape[0], logits.shape[2], 0, module)
            if fitted is not None:
                return fitted
        return None


def class_axis(logits: Tensor, given: int | None, where: str) -> int:
    """The axis of the classes of ``logits``, which is no axis of samples.

    Args:
        logits: Two or more axes.
        given: The axis, where it is known.
        where: How errors name the network.

    Raises:
        ValueError: If it is not known, or there is no such axis.
    """
    count = logits.dim()
    if given is None and count == 3:
        raise ValueError(
            f"The logits of the {where} have the shape {tuple(logits.shape)}, and the modules that make them do not "
            "tell which axis is that of the classes. Pass LogitDistillation(class_axis=1) for (B, K, T) or "
            "LogitDistillation(class_axis=-1) for (B, T, K)."
        )
    axis = 1 if given is None else given
    if not -count <= axis < count or axis % count == 0:
        raise ValueError(
            f"Expected `class_axis` to be an axis of the logits of the {where} other than that of the samples, but got "
            f"{axis} for the shape {tuple(logits.shape)}."
        )
    return axis % count


@dataclass(frozen=True)
class TracedLogits:
    """The logits of a network that was traced.

    Args:
        side: ``"student"`` or ``"teacher"``, for errors.
        trace: One forward of the network.
        select: Key or index of the logits, where the user gave one.
        named: What the user named as masks of matched layers.
    """

    side: str
    trace: Trace
    select: str | int | None = None
    named: tuple[str, ...] = ()

    @property
    def tensor(self) -> TracedTensor | None:
        """The logits in the trace; None where it does not show them."""
        return traced_logits(self.trace, self.select)


def logit_masks(of: TracedLogits) -> LayerMasks:
    """The padding masks of the logits of tokens; none for others."""
    trace, logits = of.trace, of.tensor
    if logits is not None and len(logits.shape) == 2:
        return LayerMasks(flat=flat_mask(trace, logits))
    if logits is None or len(logits.shape) != 3 or logits.neuron_axis is None:
        return LayerMasks()
    # And those of the layer that makes them: inside of the root there may be a network with masks of its own.
    made = [layer for layer in trace.layers if layer.name in output_layers(trace) and layer.calls == 1]
    made = [layer for layer in made if layer.output_shape == logits.shape]
    first = min(made, key=lambda layer: layer.order or 0, default=trace.layer(trace.root))
    found = tuple(dict.fromkeys((*first.masks, *trace.layer(trace.root).masks)))
    # What a network with an encoder and a decoder returns are tokens of the decoder.
    found = tuple(mask for mask in found if mask.source.is_of_target) or found
    found = (*(mask for name in of.named for mask in named_masks(of.side, trace, first, name)), *found)
    samples, time_first = logits.shape[logits.batch_axis], logits.batch_axis == 1
    (tokens,) = logits.positions
    masks = choose_masks(found, samples, tokens, 0, time_first=time_first)
    return with_unread(masks, trace, first, samples, tokens, time_first=time_first)


def logit_reader(of: TracedLogits, modules: Mapping[str, nn.Module], axis: int | None) -> LogitReader:
    """The reader of the logits of a network.

    Args:
        of: The logits.
        modules: All modules of the network by name.
        axis: Axis of the classes, where the user gave one.
    """
    trace, logits, masks = of.trace, of.tensor, logit_masks(of)
    root = f", module {trace.root!r}" if trace.root else ""
    known = None if logits is None or len(logits.shape) == 2 else traced_class_axis(trace, logits)
    if known == 1 and logits is not None and len(logits.shape) > 3:
        known = None  # as without a trace
    return LogitReader(
        side=of.side,
        where=f"{of.side} ({type(modules[trace.root]).__name__}{root})",
        select=of.select,
        class_axis=known if axis is None else axis,
        batch_axis=0 if logits is None else logits.batch_axis,
        masks=tuple((source, modules[source.module]) for source in masks.sources if source.true_at != "unknown"),
    )
