"""Keeps the student's batch as it is while extra forwards (the trace, the teacher) run on it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["InputGuard"]

#: Values that no forward can change.
_CONSTANT = (Tensor, nn.Module, str, bytes, int, float, complex, bool, type(None), torch.device, torch.dtype, type)


class InputGuard:
    """Gives extra forwards inputs of their own.

    Containers and data objects are copied, their tensors are not: a network may pop from its dictionary or fill in its
    graph without the student seeing it. A tensor that is written to in place shows in the first forward: it is
    restored, and from then on extra forwards get clones.

    Example:
        >>> guard, x = InputGuard(), torch.ones(2)
        >>> with warnings.catch_warnings(), guard.first_forward((x,)) as (own,):
        ...     warnings.simplefilter("ignore")
        ...     _ = own.mul_(0)
        >>> x, guard.clones
        (tensor([1., 1.]), True)
    """

    def __init__(self) -> None:
        #: Whether extra forwards get clones of the tensors.
        self.clones = False

    def copied(self, inputs: Any) -> Any:
        """The inputs in containers and data objects of their own; tensors are cloned if :attr:`clones`."""
        return _copied(inputs, self.clones)

    @contextmanager
    def first_forward(self, inputs: Any) -> Iterator[Any]:
        """Gives a copy of the inputs for the block; restores tensors that it wrote to, and says so once.

        Args:
            inputs: What the student got, in any containers.
        """
        tensors = [tensor for tensor in _tensors(inputs, set()) if not tensor.is_inference()]
        saved = [(tensor, tensor._version, tensor.detach().clone()) for tensor in tensors]
        try:
            yield self.copied(inputs)
        finally:
            changed = [(tensor, value) for tensor, version, value in saved if tensor._version != version]
            if changed:
                self.clones = True
                with torch.no_grad():
                    for tensor, value in changed:
                        # `data`, since a leaf that requires a gradient takes no other write in place.
                        tensor.data.copy_(value)
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor, _ in changed)
                warnings.warn(
                    f"A forward of the teacher or of the traced student writes to its inputs in place (shapes: "
                    f"{shapes}), as inplace=True in a normalisation does. The batch was restored, and the teacher gets "
                    "clones from now on. Write the operation without in-place changes to save these copies.",
                    stacklevel=2,
                )


def _copied(value: Any, clones: bool) -> Any:
    if isinstance(value, Tensor):
        return value.clone() if clones else value
    if isinstance(value, _CONSTANT):
        return value
    if isinstance(value, tuple):
        items = [_copied(item, clones) for item in value]
        return (
            type(value)(*items) if hasattr(value, "_fields") else type(value)(items) if type(value) is tuple else value
        )
    if type(value) is list:
        return [_copied(item, clones) for item in value]
    if type(value) is dict:  # not by `copy`, which code that is being compiled cannot contain
        return {key: _copied(item, clones) for key, item in value.items()}
    try:
        own = copy.copy(value)
    except Exception:  # what cannot be copied is passed on as it is
        return value
    if isinstance(own, MutableMapping):
        for key, item in value.items():
            own[key] = _copied(item, clones)
    elif is_dataclass(own) or isinstance(own, SimpleNamespace):
        for key, item in vars(value).items():
            object.__setattr__(own, key, _copied(item, clones))
    elif clones and hasattr(own, "clone"):  # a graph, or a batch of graphs, of PyTorch Geometric
        own = own.clone()
    return own


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in nested containers and in the attributes of data objects, each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item, seen)
    elif not isinstance(value, _CONSTANT) and hasattr(value, "__dict__"):
        for item in vars(value).values():
            yield from _tensors(item, seen)
