"""Random number generators, the global ones and those of networks: their state, and how to restore it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Generator",
    "draw",
    "generator_state",
    "is_generator",
    "random_numbers_restored",
    "random_state",
    "set_generator_state",
]

#: A generator that is an object, as a network may have one of its own.
Generator: TypeAlias = (
    torch.Generator | random.Random | np.random.Generator | np.random.RandomState | np.random.BitGenerator
)
_KINDS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


def is_generator(value: object) -> bool:
    """Whether a value is a generator with a state. That of the operating system, ``random.SystemRandom``, has none."""
    return isinstance(value, _KINDS) and not isinstance(value, random.SystemRandom)


def generator_state(generator: Generator) -> Any:
    """The state of a generator, which later draws leave as it is."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return _bits(generator).state


def set_generator_state(generator: Generator, state: Any) -> None:
    """Set back what :func:`generator_state` gave.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> state = generator_state(generator)
        >>> first = generator.random()
        >>> set_generator_state(generator, state)
        >>> generator.random() == first
        True
    """
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        _bits(generator).state = state


@contextmanager
def random_numbers_restored(tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restore the global generators after the block, also where it raises.

    Args:
        tensors: The generators of their CUDA devices are restored, beside those of the CPU.

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


def random_state(tensors: Iterable[Tensor] = (), own: Iterable[Generator] = ()) -> list[object]:
    """States of the same generators, to be compared.

    Args:
        tensors: Those of their CUDA devices are among them.
        own: More generators.
    """
    states: list[Any] = [
        torch.get_rng_state(),
        *(torch.cuda.get_rng_state(device) for device in _cuda_devices(tensors)),
    ]
    states += [random.getstate(), np.random.get_state(), *map(generator_state, own)]
    return cast("list[object]", _plain(states))


def draw(tensors: Iterable[Tensor] = (), own: Iterable[Generator] = ()) -> None:
    """Draw a number from each generator, so that what is drawn next is not what was drawn from the same state before.

    Args:
        tensors: The generators of their devices are among them.
        own: More generators.
    """
    random.random()
    np.random.random()
    for device in {torch.device("cpu"), *(tensor.device for tensor in tensors)}:
        torch.rand(1, device=device)
    for generator in own:
        if isinstance(generator, torch.Generator):
            torch.rand(1, device=generator.device, generator=generator)
        elif isinstance(generator, np.random.BitGenerator):
            generator.random_raw()
        else:
            generator.random()


def _bits(generator: np.random.Generator | np.random.BitGenerator) -> Any:
    return generator.bit_generator if isinstance(generator, np.random.Generator) else generator


def _plain(state: Any) -> Any:
    """A state in which tensors and arrays are lists, which can be compared."""
    if isinstance(state, (Tensor, np.ndarray)):
        return state.tolist()
    if isinstance(state, Mapping):
        return {key: _plain(value) for key, value in state.items()}
    return [_plain(item) for item in state] if isinstance(state, (list, tuple)) else state


def _cuda_devices(tensors: Iterable[Tensor]) -> list[int]:
    return sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})
