"""Whether a named layer can be recorded as a representation, and the errors that say why not."""

from __future__ import annotations

from lightning_otrt.layers.names import is_inside
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace, TracedLayer, TracedTensor

__all__ = ["check_common_axis", "chosen_axis", "recorded_tensor"]

#: Types of modules whose parts TorchScript runs.
_SCRIPTED = ("RecursiveScriptModule", "ScriptModule", "TopLevelTracedModule", "TracedModule")


def recorded_tensor(side: str, trace: Trace, name: str, select: str | int | None = None) -> TracedTensor:
    """The tensor that a recording of a layer reads.

    Args:
        side: ``"student"`` or ``"teacher"``, for errors.
        trace: One forward of the model.
        name: ``"name"`` or ``"name:input"``.
        select: Key or index of the tensor, where the layer returns several.

    Raises:
        ValueError: If the layer did not run, ran more than once, or gives no floating-point tensor of two or more axes.
    """
    layer = trace.layer(name)
    where = f"{side.capitalize()} layer {layer.name!r} ({layer.kind})"
    if layer.calls == 0:
        raise ValueError(f"{where} {_why_not_called(layer, trace)}")
    if layer.in_transform:
        raise ValueError(
            f"{where} runs inside a transform of torch.func (vmap, jvp, grad, ...) of the network, and its tensors "
            "cannot leave it. Name a layer that the network calls outside of the transform."
        )
    if layer.calls > 1:
        parent = layer.name.rpartition(".")[0]
        around = f", such as {parent!r}" if parent and trace.layer(parent).calls == 1 else ""
        raise ValueError(
            f"{where} ran {layer.calls} times in one forward, so it has no single representation. Name a module that "
            f"runs once, around this layer or before one of its calls{around}."
        )
    tensor = trace.tensor(name, select)
    if tensor is None:
        raise ValueError(f"{where} {_why_no_tensor(layer, name, select)}")
    what = f"receives {tensor.dtype}" if name.endswith(INPUT) else f"returns {tensor.dtype}"
    if not tensor.is_floating:
        raise ValueError(
            f"{where} {what} of shape {tensor.shape}; a representation needs a real floating-point tensor to carry a "
            "gradient. Name a layer that gives one."
        )
    if len(tensor.shape) < 2:
        raise ValueError(
            f"{where} {what} of shape {tensor.shape}; a representation needs (batch, neurons, ...). "
            "Name an earlier layer."
        )
    return tensor


def chosen_axis(side: str, trace: Trace, name: str, given: int | None, tensor: TracedTensor) -> int:
    """The non-negative axis of the neurons: the given one, else that of the trace.

    Raises:
        ValueError: If it is ambiguous, out of range or the axis of the samples.
    """
    where = f"{side.capitalize()} layer {name!r} ({trace.layer(name).kind}) of shape {tensor.shape}"
    axis = tensor.neuron_axis if given is None else given
    if axis is None:
        raise ValueError(
            f"{where} has an ambiguous neuron axis: the types of its modules do not tell whether it is channels-first "
            "or channels-last. Give the pair a `neuron_axis`: 1 for (B, C, ...), -1 for (B, ..., C), or two, (student, "
            "teacher), where the networks differ."
        )
    count = len(tensor.shape)
    if not -count <= axis < count:
        raise ValueError(f"{where}: expected `neuron_axis` to lie in [{-count}, {count - 1}], but got {axis}.")
    if axis % count == tensor.batch_axis:
        raise ValueError(f"{where}: `neuron_axis` {axis} is the axis of the samples. Choose another axis.")
    return axis % count


def check_common_axis(axis: int, student: str, teacher: str, tensors: tuple[TracedTensor, TracedTensor]) -> None:
    """Refuse one axis for both layers of a pair where the types of the modules tell another one for one of them.

    Args:
        axis: What the user passed for both.
        student: Name of the student's layer, for the error.
        teacher: Name of the teacher's layer.
        tensors: Of student and teacher.

    Raises:
        ValueError: If the known axis of exactly one side differs from it.
    """
    if any(not -len(tensor.shape) <= axis < len(tensor.shape) for tensor in tensors):
        return  # an error of its own
    known = [tensor.neuron_axis for tensor in tensors]
    differs = [own is not None and own != axis % len(tensor.shape) for own, tensor in zip(known, tensors, strict=True)]
    if sum(differs) != 1:  # two that differ are meant
        return
    place = differs.index(True)
    own = known[place]
    side, name, both = ("teacher", teacher, (axis, own)) if place else ("student", student, (own, axis))
    raise ValueError(
        f"LayerPair {student!r} -> {teacher!r}: `neuron_axis={axis}` was passed for both layers, but by the types of "
        f"its modules the {side} layer {name!r} of shape {tensors[place].shape} has its neurons on axis {own}. Write "
        f"neuron_axis={both} for (student, teacher), or neuron_axis={(axis, axis)} if {axis} is meant for both."
    )


def _why_not_called(layer: TracedLayer, trace: Trace) -> str:
    if trace.root and layer.name != trace.root and not layer.name.startswith(f"{trace.root}."):
        return (
            f"did not run: the forward of {trace.root!r} was traced, and the layer is not inside it. Name a layer "
            f"inside {trace.root!r}, or choose the `student_root` that holds the layer."
        )
    scripted = [outer for outer in trace.layers if outer.kind in _SCRIPTED and is_inside(layer.name, outer.name)]
    outside = next((outer for outer in scripted if outer.name != layer.name), None)
    if outside is not None:
        return (
            f"is inside the TorchScript module {outside.name!r}, which runs its parts without Python, so that they "
            f"cannot be recorded. Name {outside.name!r} itself, whose output can be, or use the network that it was "
            "made from."
        )
    children = [child.name for child in trace.layers if child.name.rpartition(".")[0] == layer.name and child.name]
    if layer.is_container and any(trace.layer(child).calls for child in children):
        return (
            "is a container that is never called itself, so it has no output. Name a child: "
            f"{', '.join(map(repr, children[:20]))}."
        )
    return (
        "did not run in this forward. Likely causes: a branch that was not taken, a branch for training only, or a "
        "parent that uses the weights without calling the module (as MultiheadAttention does). Name a layer that runs."
    )


def _why_no_tensor(layer: TracedLayer, name: str, select: str | int | None) -> str:
    if name.endswith(INPUT):
        return "gets no tensor as an argument, so ':input' has nothing to record. Name the layer before it."
    keys = [key for key, _ in layer.parts]
    if not keys:
        return f"returns {layer.output_kind}, which holds no tensor to record. Name a layer that returns one."
    if select is not None:
        return f"returns {layer.output_kind}, without a tensor at select={select!r}. Choose `select` among {keys}."
    return (
        f"returns {layer.output_kind}, not one tensor. Choose one with "
        f"LayerPair(..., select={keys[0]!r}); there are {keys}."
    )
