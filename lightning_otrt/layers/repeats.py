"""Layers that run more than once in one forward: in a loop over one layer, or for each of several inputs."""

from __future__ import annotations

from lightning_otrt.layers.names import is_inside
from lightning_otrt.layers.trace import LINEAR, Trace, TracedLayer

__all__ = ["end_of_loop", "feeds_itself", "repeated_parts"]

#: Roles of layers with weights. Activations are shared by many layers, which says nothing.
_WITH_WEIGHTS = (*LINEAR, "recurrent")


def repeated_parts(trace: Trace) -> list[TracedLayer]:
    """The outermost parts of a network that run more than once in one forward, in order of completion.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_otrt.reading.tracer import trace
        >>> class Siamese(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder, self.head = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(8, 2)
        ...     def forward(self, a, b):
        ...         return self.head(torch.cat([self.encoder(a), self.encoder(b)], 1))
        >>> seen = trace(Siamese(), (torch.randn(5, 3), torch.randn(5, 3)))
        >>> [(part.name, part.calls, feeds_itself(part)) for part in repeated_parts(seen)]
        [('encoder', 2, False)]
    """
    repeated = [layer for layer in trace.layers if layer.calls > 1]
    parts = [layer for layer in repeated if layer.is_container or layer.role in _WITH_WEIGHTS]
    around = tuple(f"{layer.name}." for layer in repeated)
    outermost = [layer for layer in parts if not layer.name.startswith(around)]
    return sorted(outermost, key=lambda layer: layer.order or 0)


def feeds_itself(part: TracedLayer) -> bool:
    """Whether what a part gave enters it again, as where one layer stands for all depths of a network."""
    return part.input_from is not None and is_inside(part.input_from, part.name)


def end_of_loop(trace: Trace, part: TracedLayer) -> tuple[str, str | int | None] | None:
    """The innermost module around a loop over one part that gives its end, and the ``select`` of that; None if none.

    Args:
        trace: Trace of the network.
        part: A part that feeds itself.
    """
    parts = part.name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        around = trace.layer(".".join(parts[:end]))
        if around.is_recordable and around.name != trace.root:
            return around.name, None
        if around.calls == 1 and len(around.parts) == 1 and around.name != trace.root:
            return around.name, around.parts[0][0]
    return None
