"""Whether what a network computes depends on the random numbers that it draws in evaluation mode."""

from __future__ import annotations

from torch import nn

from lightning_otrt.layers.trace import Trace
from lightning_otrt.random_numbers import draw
from lightning_otrt.reading.containers import all_tensors
from lightning_otrt.reading.extra_forwards.evaluation import state_restored
from lightning_otrt.reading.extra_forwards.input_guard import InputGuard
from lightning_otrt.reading.probes.profiles import is_close, profiles
from lightning_otrt.reading.traced.arguments import Inputs

__all__ = ["is_random"]


def is_random(model: nn.Module, traced: Trace, inputs: Inputs, method: str) -> bool:
    """Whether some layer gives other values where other numbers are drawn.

    Some networks draw numbers that they use in training alone, such as those of a LayerDrop. Only a network that drew
    some runs twice more, on the same inputs and with other numbers.

    Args:
        model: The whole model.
        traced: The trace of one forward.
        inputs: Arguments of the root, not used by another forward before.
        method: Method of the root that is called in place of its forward.
    """
    if not traced.draws_random:
        return False
    copies = InputGuard(clones=True)
    first = profiles(model, traced, copies.copied(inputs), method)
    tensors = list(all_tensors(inputs))
    with state_restored(model, tensors) as generators:
        draw(tensors, generators)
        second = profiles(model, traced, copies.copied(inputs), method)
    return first.keys() != second.keys() or not all(
        is_close(one, other) for name, found in first.items() for one, other in zip(found, second[name], strict=True)
    )
