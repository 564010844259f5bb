"""The global random number generators of torch, NumPy and Python: their state, and how to leave them as they are."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

__all__ = ["draw", "random_numbers_restored", "random_state"]


@contextmanager
def random_numbers_restored(tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restore the generators after the block, also where it raises.

    Args:
        tensors: The generators of their devices are restored, beside those of the CPU.

    Example:
        >>> import torch
        >>> state = torch.get_rng_state()
        >>> with random_numbers_restored():
        ...     noise = torch.randn(3)
        >>> torch.equal(torch.get_rng_state(), state)
        True
    """
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=_cuda_devices(tensors)):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def random_state(tensors: Iterable[Tensor] = ()) -> list[object]:
    """States of the same generators, to be compared.

    Args:
        tensors: Those of their devices are among them.
    """
    name, keys, *rest = np.random.get_state()
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _cuda_devices(tensors))]
    return [random.getstate(), name, np.asarray(keys).tolist(), *rest, *(state.tolist() for state in states)]


def draw(tensors: Iterable[Tensor] = ()) -> None:
    """Draw a number from each generator, so that what is drawn next is not what was drawn from the same state before.

    Args:
        tensors: The generators of their devices are among them.
    """
    random.random()
    np.random.random()
    for device in {torch.device("cpu"), *(tensor.device for tensor in tensors)}:
        torch.rand(1, device=device)


def _cuda_devices(tensors: Iterable[Tensor]) -> list[int]:
    return sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})
