"""The network inside of a model whose own forward has no batch of tensors, such as the backbone of a detector."""

from __future__ import annotations

from lightning_otrt.layers.trace import Trace, TracedLayer

__all__ = ["inner_hint"]


def inner_hint(trace: Trace, side: str) -> str:
    """What to pass where the layers of a model are those of a network inside of it; empty if there is none.

    A model that takes a list of images has no batch of its own, but the module that its first batch enters has.

    Args:
        trace: Trace of the model.
        side: ``"student"`` or ``"teacher"``.

    Example:
        >>> from lightning_otrt.layers.trace import TracedTensor
        >>> image, maps = TracedTensor((2, 3, 8, 8)), TracedTensor((2, 4, 8, 8), neuron_axis=1)
        >>> conv = TracedLayer("net.backbone.conv", "Conv2d", 0, 1, input=image, output=maps)
        >>> backbone = TracedLayer("net.backbone", "FPN", 1, 1, is_container=True, input=image)
        >>> trace = Trace((TracedLayer("", "Detector", 2, 1, is_container=True), backbone, conv))
        >>> inner_hint(trace, "student").rpartition(": ")[2]
        "pass student_root='net.backbone'."
    """
    root = trace.layer(trace.root)
    # A batch may be a keyword argument. (C, H, W) is an image of a list, beside which stand the boxes of each.
    shapes = [shape for shape in root.input_shapes if shape]
    lists_images = any(len(shape) == 3 and shape[0] != trace.batch_size for shape in shapes)
    has_batch = not lists_images and any(len(shape) != 3 and trace.is_sample_count(shape[0]) for shape in shapes)
    # Of a method that stands for the forward, no hook tells what it gets.
    inner = None if root.input is not None or has_batch or not root.calls else _largest(trace)
    if inner is None or inner.input is None:
        return ""
    where = f"pass student_root={inner.name!r}" if side == "student" else "pass this module as the teacher"
    return (
        f" The {side} takes no tensor as its first argument. {inner.name!r} ({inner.kind}) inside of it takes one of "
        f"shape {inner.input.shape} and gives maps or sequences: {where}."
    )


def _largest(trace: Trace) -> TracedLayer | None:
    """The container with a tensor as input that holds most layers with positions; the outermost of equal ones."""
    maps = [layer.name for layer in trace.layers if layer.is_recordable and len(layer.output_shape or ()) > 2]
    inside = {
        layer: sum(name.startswith(f"{layer.name}.") for name in maps)
        for layer in trace.layers
        if layer.is_container and layer.calls == 1 and layer.input is not None and layer.name != trace.root
    }
    found = max(inside, key=lambda layer: inside[layer], default=None)
    return found if found is not None and inside[found] else None
