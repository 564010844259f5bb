"""Whether the rows of layers that may be experts are those of the samples in order: it shows on a rolled batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_otrt.layers.names import named_layers
from lightning_otrt.layers.pairs import INPUT
from lightning_otrt.layers.trace import Trace
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.probes.profiles import profiles
from lightning_otrt.reading.probes.sample_order import follows, roll, rolled
from lightning_otrt.reading.traced.arguments import Inputs

__all__ = ["settle_rows"]


def settle_rows(model: nn.Module, traced: Trace, names: Iterable[str], inputs: Inputs, method: str = "") -> Trace:
    """The trace with those of the layers whose rows are not shown to be the samples, or all their positions, in order.

    An expert may get as many rows as there are samples by chance, and then other ones in each network. So where a layer
    may be an expert, the network runs twice more: on these inputs, and on the same with the last sample first. Others
    cost nothing.

    Args:
        model: The whole model.
        traced: The trace of one forward.
        names: Names of the layers that are to be read, with ``":input"`` for what enters.
        inputs: Arguments of the root.
        method: Method of the root that is called in place of its forward.
    """
    modules, samples = named_layers(model), traced.batch_size
    possible = [name for name in dict.fromkeys(names) if _may_be_chosen(name, traced, modules)]
    if samples < 2 or not possible:
        return traced
    try:
        given = InputGuard(clones=True).copied(inputs), rolled(inputs, samples, 0)
        first, second = (profiles(model, traced, each, method) for each in given)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # these samples cannot stand in another order: nothing shows whose the rows are
        first = second = {}
    chosen = [name for name in possible if not _follow(first.get(name), second.get(name), samples)]
    return replace(traced, chosen_rows=tuple(dict.fromkeys((*traced.chosen_rows, *chosen))))


def _may_be_chosen(name: str, traced: Trace, modules: dict[str, nn.Module]) -> bool:
    """Whether a layer has rows, and is called an expert or stands in a list of modules of its type."""
    tensor = traced.tensor(name)
    if tensor is None or tensor.batch_axis or not traced.batch_size or tensor.shape[0] % traced.batch_size:
        return False
    parts = name.removesuffix(INPUT).split(".")
    if any("expert" in part.lower() for part in parts):
        return True
    around = [(modules[".".join(parts[:end])], ".".join(parts[: end + 1])) for end in range(len(parts))]
    return len(tensor.shape) == 2 and any(
        isinstance(parent, (nn.ModuleList, nn.ModuleDict))
        and sum(type(child) is type(modules[inside]) for child in parent.children()) > 1
        for parent, inside in around
    )


def _follow(first: tuple[Tensor, Tensor] | None, second: tuple[Tensor, Tensor] | None, samples: int) -> bool:
    """Whether the rows of a rolled batch are the rolled rows, with samples or positions outermost."""
    return first is not None and second is not None and follows(first, second, 0, samples, roll)
