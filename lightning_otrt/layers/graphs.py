"""Networks whose forward is a graph, in which some of their modules do not run: torch.fx, torch.export, TorchScript."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_otrt.layers.names import ancestors, is_inside
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace

__all__ = ["graph_hint", "inside_blocks"]


def graph_hint(trace: Trace, side: str) -> str:
    """Why nothing inside of a network runs as a module, and what to pass; empty where a layer with weights does.

    Args:
        trace: Trace of the network.
        side: ``"student"`` or ``"teacher"``.

    Example:
        >>> from lightning_otrt.layers.trace import TracedLayer
        >>> layers = TracedLayer("", "GraphModule", 0, 1, is_container=True, is_graph=True), TracedLayer("fc", "Linear")
        >>> graph_hint(Trace(layers), "teacher").partition(". ")[2]
        'Pass the network that it was made from as the teacher.'
    """
    graph = next((layer for layer in trace.layers if layer.is_graph and layer.is_container and layer.calls), None)
    if graph is None or any(layer.calls for layer in trace.layers if layer.has_weights and not layer.is_container):
        return ""
    return (
        "it is a graph of torch.export or TorchScript, which runs its layers without their modules. Pass the network "
        f"that it was made from as the {side}."
    )


def inside_blocks(trace: Trace, names: Iterable[str]) -> list[tuple[str, str]]:
    """The layers that stand for a block of a graph, and that block, which does not run as a module.

    What code computes at the end of such a block, as the addition of a residual block, is not in the layer. Where the
    layer is what the next module gets, nothing is missing.

    Args:
        trace: Trace of the network.
        names: The chosen layers.
    """
    graphs = [layer for layer in trace.layers if layer.is_graph and layer.calls]
    known = {layer.name: layer for layer in trace.layers}
    entered = {layer.input_from for layer in trace.layers}
    found = []
    for name in names if graphs else ():
        around = [
            known[outer]
            for outer in ancestors(name)
            if outer in known and any(outer != graph.name and is_inside(outer, graph.name) for graph in graphs)
        ]
        skipped = [layer.name for layer in around if not layer.calls]
        if skipped and not name.endswith(INPUT) and name not in entered:
            found.append((name, max(skipped, key=len)))
    return found
