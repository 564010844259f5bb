"""Where the logits of a model are, as a trace shows it: which tensor of its output, and which layer makes them."""

from __future__ import annotations

from collections.abc import Collection

from lightning_otrt.layers.head import classification_head, input_before_dropout
from lightning_otrt.layers.model_output import last_linear_layers, output_layers
from lightning_otrt.layers.trace import LINEAR, Trace, TracedLayer, TracedTensor

__all__ = ["head_input", "logit_key", "other_head", "traced_class_axis", "traced_logits"]

#: Keys under which libraries return logits: Hugging Face, and the segmentation networks of torchvision.
_KEYS = ("logits", "out")
#: Types of modules that may follow a head. Behind other nonlinearities stand features.
_AFTER_LOGITS = ("Softmax", "LogSoftmax", "Sigmoid", "LogSigmoid", "Identity", "Flatten", "Unflatten")


def logit_key(keys: Collection[str | int]) -> str | int | None:
    """Which of the tensors of an output are the logits; None where that is not known.

    Example:
        >>> logit_key(["loss", "logits"]), logit_key([0, 1]), logit_key(["boxes"])
        ('logits', 0, None)
    """
    return next((key for key in (*_KEYS, 0) if key in keys), None)


def traced_logits(trace: Trace, select: str | int | None) -> TracedTensor | None:
    """The logits in the traced output of the root; None where the trace does not show them.

    Args:
        trace: One forward of the model.
        select: Key or index, where the user gave one.
    """
    root = trace.layer(trace.root)
    return dict(root.parts).get(_key(root, select)) if root.parts else root.output  # type: ignore[arg-type]


def _key(root: TracedLayer, select: str | int | None) -> str | int | None:
    """Which part of an output the logits are. By name first, as in a step: a named tuple has indices, too."""
    name = "logits" if select is None else select
    if name in root.fields:
        return root.fields.index(str(name))
    return logit_key([key for key, _ in root.parts]) if select is None else select


def traced_class_axis(trace: Trace, logits: TracedTensor) -> int | None:
    """The axis of the classes of traced logits; None where it is not known.

    Code may have moved the channels of a map to the end. They are as many as the last linear layer has neurons.

    Args:
        trace: One forward of the model.
        logits: Its logits.
    """
    ran = (layer for layer in trace.layers if layer.role in LINEAR and layer.order is not None and layer.output)
    last = max(ran, key=lambda layer: layer.order or 0, default=None)
    if logits.neuron_axis is not None or len(logits.shape) < 4 or last is None or last.output is None:
        return logits.neuron_axis
    axis = last.output.neuron_axis
    classes = None if axis is None else last.output.shape[axis]
    is_last = logits.shape[-1] == classes != logits.shape[1]
    return len(logits.shape) - 1 if is_last else None


def other_head(trace: Trace, select: str | int | None) -> str | int | None:
    """The key of another tensor of the output that is made by a linear layer, where the first one is not.

    Networks that return features and logits are of this kind: the first item is taken for the logits.

    Args:
        trace: One forward of the model.
        select: Key or index, where the user gave one.
    """
    root = trace.layer(trace.root)
    parts = dict(root.parts)
    if (
        select is not None
        or "logits" in root.fields
        or _key(root, None) != 0
        or len(parts) < 2
        or len(parts[0].shape) < 2
    ):
        return None
    first = parts.pop(0)
    made = {layer.output_shape for layer in trace.layers if layer.gives_model_output and layer.role == "linear"}
    # Where code made it of what a module returned, its shape is all that tells.
    if _head_of(trace, first) is not None or (first.made_by is None and first.shape in made):
        return None
    return next((key for key, tensor in parts.items() if tensor.shape in made), None)


def head_input(trace: Trace, logits: TracedTensor) -> str | None:
    """What enters the last linear map or convolution before the logits; None where none is found.

    Args:
        trace: One forward of the model.
        logits: Its logits, with a known axis of the classes.
    """
    if (head := _head_of(trace, logits)) is not None:
        return input_before_dropout(trace, head)
    if len(logits.shape) == 2:
        last = last_linear_layers(trace)
        if len(trace.layer(trace.root).parts) > 1 and len(last) > 1:
            heads = [layer for layer in last if layer.output is not None and layer.output.shape == logits.shape]
            return input_before_dropout(trace, heads[0]) if len(heads) == 1 else None
        head = classification_head(trace)
        return None if head is None else input_before_dropout(trace, head)
    made = output_layers(trace)
    heads = [layer for layer in trace.layers if layer.name in made and layer.role in LINEAR and layer.calls == 1]
    if not heads:
        return None
    # One head for each tensor of the output, as where a segmentation network has an auxiliary one.
    outputs = [tensor for _, tensor in trace.layer(trace.root).parts if tensor.shape == logits.shape]
    heads.sort(key=lambda layer: layer.order or 0)
    place = next((place for place, tensor in enumerate(outputs) if tensor is logits), 0)
    return input_before_dropout(trace, heads[place] if len(heads) == len(outputs) else heads[-1])


def _head_of(trace: Trace, logits: TracedTensor) -> TracedLayer | None:
    """The linear layer whose output the logits are, perhaps as probabilities or in another shape."""
    name = logits.made_by
    while name is not None:
        layer = trace.layer(name)
        if layer.calls > 1:
            return None
        if layer.role in LINEAR:
            return layer
        name = layer.input_from if layer.kind in _AFTER_LOGITS or layer.role in ("dropout", "pool") else None
    return None
