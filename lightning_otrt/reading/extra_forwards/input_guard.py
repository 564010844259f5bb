"""Keeps the student's batch as it is while extra forwards (the trace, the teacher) run on it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_otrt.notices import warn
from lightning_otrt.reading.containers import CONSTANT, tensors_in
from lightning_otrt.reading.extra_forwards.plain_values import slot_names
from lightning_otrt.reading.torch_internals import version_of

__all__ = ["InputGuard"]


class InputGuard:
    """Gives extra forwards inputs of their own.

    Containers and data objects are copied at all depths, their tensors are not: a network may pop from its dictionary,
    fill in its graph or append to its cache without the student seeing it. A tensor that is written to in place shows
    in the first forward: it is restored, and from then on extra forwards get clones. A later one is an error.

    Args:
        clones: Whether extra forwards get clones of the tensors from the start.

    Example:
        >>> import warnings
        >>> guard, x = InputGuard(), torch.ones(2)
        >>> with warnings.catch_warnings(), guard.first_forward((x,)) as (own,):
        ...     warnings.simplefilter("ignore")
        ...     _ = own.mul_(0)
        >>> x, guard.clones
        (tensor([1., 1.]), True)
    """

    def __init__(self, *, clones: bool = False) -> None:
        #: Whether extra forwards get clones of the tensors.
        self.clones = clones

    @contextmanager
    def later_forward(self, inputs: Any) -> Iterator[Any]:
        """Gives a copy of the inputs for the block.

        Args:
            inputs: What the student got, in any containers.

        Raises:
            RuntimeError: If the block wrote to a tensor, which no forward has done before: its values are lost.
        """
        if torch.compiler.is_compiling():
            yield self.copied(inputs)
            return
        before = [(tensor, version_of(tensor)) for tensor in tensors_in(inputs)]
        yield self.copied(inputs)
        changed = [str(tuple(tensor.shape)) for tensor, version in before if version_of(tensor) != version]
        if changed:
            self.clones = True
            raise RuntimeError(
                f"The teacher wrote to its inputs in place in this step (shapes: {', '.join(changed)}), and not in the "
                "first one, as where it resizes some batches alone. So the student would get what it wrote. Write the "
                "operation without in-place changes, or pass `teacher_inputs=torch.clone`, which gives it a copy."
            )

    def copied(self, inputs: Any) -> Any:
        """The inputs in containers and data objects of their own; tensors are cloned if :attr:`clones`."""
        return _copied(inputs, self.clones, {})

    @contextmanager
    def first_forward(self, inputs: Any) -> Iterator[Any]:
        """Gives a copy of the inputs for the block; restores tensors that it wrote to, and says so once.

        Args:
            inputs: What the student got, in any containers.
        """
        tensors = [tensor for tensor in tensors_in(inputs) if not tensor.is_inference()]
        saved = [(tensor, version_of(tensor), tensor.detach().clone()) for tensor in tensors]
        try:
            yield self.copied(inputs)
        finally:
            changed = [(tensor, value) for tensor, version, value in saved if version_of(tensor) != version]
            if changed:
                self.clones = True
                with torch.no_grad():
                    for tensor, value in changed:
                        # `data`, since a leaf that requires a gradient takes no other write in place.
                        tensor.data.copy_(value)
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor, _ in changed)
                warn(
                    f"A forward of the teacher or of the traced student writes to its inputs in place (shapes: "
                    f"{shapes}), as inplace=True in a normalisation does. The batch was restored, and the teacher gets "
                    "clones from now on. Write the operation without in-place changes to save these copies.",
                )


def _copied(value: Any, clones: bool, known: dict[int, tuple[Any, Any]]) -> Any:
    """A copy of containers and objects at all depths. ``known`` holds each original with its copy, by identity."""
    if (isinstance(value, Tensor) and not clones) or isinstance(value, CONSTANT):
        return value
    if torch.compiler.is_compiling() and type(value) in (Tensor, tuple, list, dict):
        # Compiled code would be compiled again in each step, since the identities of the arguments are others.
        return _new_copy(value, clones, known)
    if id(value) not in known:
        known[id(value)] = value, value  # an object that holds itself
        known[id(value)] = value, _new_copy(value, clones, known)
    return known[id(value)][1]


def _new_copy(value: Any, clones: bool, known: dict[int, tuple[Any, Any]]) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        items = [_copied(item, clones, known) for item in value]
        return (
            type(value)(*items) if hasattr(value, "_fields") else type(value)(items) if type(value) is tuple else value
        )
    if type(value) is list:
        return [_copied(item, clones, known) for item in value]
    if type(value) is dict:  # not by `copy`, which code that is being compiled cannot contain
        return {key: _copied(item, clones, known) for key, item in value.items()}
    try:
        own = copy.copy(value)
    except Exception:  # what cannot be copied is passed on as it is
        return value
    if own is value:
        return value
    known[id(value)] = value, own
    if isinstance(own, MutableMapping):
        for key, item in value.items():
            own[key] = _copied(item, clones, known)
        return own
    if isinstance(own, (list, deque)):
        items = [_copied(item, clones, known) for item in own]
        own.clear()
        own.extend(items)
    if hasattr(own, "__dict__") and vars(own) is not vars(value):
        # In the dictionary itself: a graph of PyTorch Geometric, or a frozen dataclass, has attributes of its own.
        for key, item in list(vars(own).items()):
            vars(own)[key] = _copied(item, clones, known)
    for key in slot_names(type(own)):
        if hasattr(own, key):
            object.__setattr__(own, key, _copied(getattr(own, key), clones, known))
    return own
