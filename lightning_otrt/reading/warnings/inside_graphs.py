"""The warning where words choose layers inside of the blocks of a graph, since these blocks do not run as modules."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_otrt.layers.grammar import WORDS, parse_layers
from lightning_otrt.layers.graphs import inside_blocks
from lightning_otrt.layers.pairs import LayerSpec
from lightning_otrt.layers.trace import Trace
from lightning_otrt.notices import warn

__all__ = ["warn_of_blocks_in_graphs"]


def warn_of_blocks_in_graphs(layers: LayerSpec, side: str, trace: Trace, chosen: Iterable[str]) -> None:
    """Warn where a layer is taken in place of the block around it, of which it lacks the end.

    Args:
        layers: What the user passed as ``layers``.
        side: ``"student"`` or ``"teacher"``.
        trace: Trace of that network.
        chosen: Its layers that were chosen.
    """
    if not any({entry.student, entry.teacher} & {*WORDS} for entry in parse_layers(layers)):
        return
    if not (found := inside_blocks(trace, chosen)):
        return
    name, block = found[-1]
    others = f" and {len(found) - 1} more" if len(found) > 1 else ""
    warn(
        f"The {side} ({trace.layer(trace.root).kind}) is a graph of torch.fx, in which blocks do not run as modules. "
        f"{layers!r} takes {name!r}{others} in place of {block!r}, so that what the block computes at its end, as the "
        f"addition of a residual block, is left out. Pass the network that the graph was made from as the {side}, or "
        "name the layers."
    )
