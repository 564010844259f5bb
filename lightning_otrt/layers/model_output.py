"""Which layers make the output of a model: logits, pictures and regression maps are no representations."""

from __future__ import annotations

from lightning_otrt.layers.names import ancestors
from lightning_otrt.layers.trace import LINEAR, Trace, TracedLayer

__all__ = ["assumed_output", "last_linear_layers", "output_layers", "passes_on"]

#: What may stand between the last linear map and the output of the model.
_PASSING = ("pool", "dropout", "passive")
#: A rectified output of more channels is a representation: networks without a head end like that.
_CHANNELS_OF_RECTIFIED = 3


def output_layers(trace: Trace) -> set[str]:
    """Names of the layers that make a dense output of the model, or are part of making it.

    These are:

    - linear maps and convolutions whose output enters no layer with weights, such as the heads of a detector;
    - those with as many channels as an output of the model, or with one channel, whose output enters no other layer
      unchanged, such as the heads of the earlier stages of a stack. With more than three channels, and where the next
      layer gets nothing else and as many numbers, code has an activation between the two;
    - the activations after them;
    - containers that return what one of these made;
    - containers whose code adds several of these up, as LRASPP does with class logits.

    Where the model returns no such tensor, such as its loss alone, they are those of :func:`assumed_output`.

    Args:
        trace: One forward of the model.

    Example:
        >>> from lightning_otrt.reading.tracer import trace
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3), nn.Tanh())
        >>> sorted(output_layers(trace(net, (torch.zeros(2, 3, 9, 9),))) - {""})
        ['2', '3']
    """
    channels = _output_channels(trace) | {1}  # one neuron is no representation
    ran = _ran(trace)
    leaves = _leaves(ran)
    assumed = assumed_output(trace)
    followers: dict[str, list[TracedLayer]] = {}
    for layer in leaves:
        if layer.input_from is not None:
            followers.setdefault(layer.input_from, []).append(layer)
    unused, alone = _unused(leaves), _alone_before_another(leaves)
    found: set[str] = set()
    for layer in leaves:
        if layer.role not in LINEAR or layer.output is None or len(layer.output.shape) < 3:
            continue
        axis = layer.output.neuron_axis
        is_output = axis is not None and layer.output.shape[axis] in channels
        if axis is not None and layer.output.shape[axis] > _CHANNELS_OF_RECTIFIED and not layer.gives_model_output:
            is_output &= layer.name not in alone
        if axis is None or not (is_output or layer.name in assumed or layer.name in unused):
            continue
        chain = _passing_on(layer, followers)
        is_rectified = chain and any(trace.layer(name).kind == "ReLU" for name in chain)
        if chain is not None and not (is_rectified and layer.output.shape[axis] > _CHANNELS_OF_RECTIFIED):
            found |= {layer.name, *chain}
    found |= {layer.name for layer in ran if _puts_together(layer, leaves, found)}
    return found | {layer.name for layer in ran if layer.output_from in found}


def _ran(trace: Trace) -> list[TracedLayer]:
    """The layers that ran, without those that make weights."""
    return [layer for layer in trace.layers if layer.calls and not layer.makes_weights]


def _leaves(ran: list[TracedLayer]) -> list[TracedLayer]:
    """The layers inside of which no other one ran."""
    around = {"", *(name for layer in ran for name in ancestors(layer.name))}
    return [layer for layer in ran if layer.name not in around]


def _unused(leaves: list[TracedLayer]) -> set[str]:
    """Names of the layers on whose output no layer with weights computes, such as the heads of a detector.

    What has no weights, such as the anchors of a detector, only belongs to the output.
    """
    used = {name for layer in leaves if layer.has_weights for name in layer.reached_by}
    return {layer.name for layer in leaves} - used


def _alone_before_another(leaves: list[TracedLayer]) -> set[str]:
    """Names of the layers whose output, in its shape, is all that a layer with weights gets."""
    shapes = {layer.name: layer.output_shape for layer in leaves}
    alone = [layer for layer in leaves if layer.has_weights and len(layer.reached_by) == 1]
    return {name for layer in alone for name in layer.reached_by if layer.input and shapes[name] == layer.input.shape}


def _output_channels(trace: Trace) -> set[int]:
    """Numbers of channels of the dense outputs whose axis of channels is known."""
    root = trace.layer(trace.root)
    tensors = (root.output, *(tensor for _, tensor in root.parts))
    dense = [tensor for tensor in tensors if tensor is not None and len(tensor.shape) > 2 and tensor.is_floating]
    return {tensor.shape[tensor.neuron_axis] for tensor in dense if tensor.neuron_axis is not None}


def last_linear_layers(trace: Trace) -> list[TracedLayer]:
    """The linear layers on whose output no other layer with weights computes, such as heads.

    Args:
        trace: One forward of the model.
    """
    leaves = _leaves(_ran(trace))
    unused = _unused(leaves)
    return [layer for layer in leaves if layer.name in unused and layer.role in LINEAR]


def assumed_output(trace: Trace) -> tuple[str, ...]:
    """The linear maps that are taken for the output of a model that returns no tensor which shows it.

    These are the last one that ran, if nothing but a loss computes after it, and others that get the same tensor.

    Args:
        trace: One forward of the model.
    """
    if trace.shows_output:
        return ()
    leaves = sorted(_leaves(_ran(trace)), key=lambda layer: layer.order or 0, reverse=True)
    last = next((layer for layer in leaves if not passes_on(layer)), None)
    if last is None or last.role not in LINEAR:
        return ()
    return tuple(
        layer.name
        for layer in leaves
        if layer is last or (layer.role in LINEAR and layer.input_from == last.input_from is not None)
    )


def passes_on(layer: TracedLayer) -> bool:
    """Whether a layer without children may stand between the last linear map and the output of a model.

    A loss may, too: it gives no representation.
    """
    return layer.role in _PASSING or (layer.output is not None and len(layer.output.shape) < 2)


def _puts_together(container: TracedLayer, leaves: list[TracedLayer], found: set[str]) -> bool:
    """Whether the code of a container makes its output of these layers alone, and of nothing that entered it.

    The last two layers inside it are two of these, and it has as many channels. A residual block has the channels of
    what enters it, and so has a part of one that gets the residual as its second argument.
    """
    output = container.output
    if not container.is_container or container.output_from != container.name or output is None:
        return False
    inside = [layer for layer in leaves if layer.name.startswith(f"{container.name}.")]
    last = sorted(inside, key=lambda layer: layer.order or 0)[-2:]
    axis = output.neuron_axis
    if axis is None or len(last) < 2 or not {layer.name for layer in last} <= found:
        return False
    channels = output.shape[axis]
    entered = container.input
    keeps = entered is not None and entered.neuron_axis is not None and entered.shape[entered.neuron_axis] == channels
    keeps |= output.shape in container.input_shapes
    made = [layer.output for layer in last if layer.output is not None and layer.output.neuron_axis is not None]
    return not keeps and all(tensor.shape[tensor.neuron_axis or 0] == channels for tensor in made)


def _passing_on(layer: TracedLayer, followers: dict[str, list[TracedLayer]]) -> set[str] | None:
    """The layers that get the output of this one and pass it on; None where one of them computes further."""
    found: set[str] = set()
    for follower in followers.get(layer.name, []):
        if not passes_on(follower) or follower.calls > 1:
            return None
        after = _passing_on(follower, followers)
        if after is None:
            return None
        found |= {follower.name, *after}
    return found
