"""Batches of a data loader: moved to a device, and the arguments that a network takes from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

__all__ = ["Inputs", "batch_inputs", "check_accepted", "check_batches", "to_device"]

#: Positional and keyword arguments of a network.
Inputs: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@runtime_checkable
class _Movable(Protocol):
    """A tensor, or an object that moves its own tensors, such as a batch of graphs."""

    def to(self, device: torch.device) -> Any:
        """The object on a device."""


def check_batches(dataloader: Any) -> None:
    """Check that a user passed batches, and not one of them.

    Raises:
        TypeError: If it is a tensor, whose rows would be taken for batches.
    """
    if isinstance(dataloader, Tensor):
        raise TypeError(
            "Expected argument `dataloader` to give batches, such as a DataLoader or a list of batches, but got one "
            f"tensor of shape {tuple(dataloader.shape)}. If it is one batch, pass it in a list."
        )


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on a device: tensors, and objects with a method ``to``, in any nested containers.

    Example:
        >>> import torch
        >>> batch = {"images": torch.zeros(2, 3), "names": ["a", "b"]}
        >>> moved = to_device(batch, torch.device("meta"))
        >>> moved["images"].device, moved["names"]
        (device(type='meta'), ['a', 'b'])
    """
    return apply_to_collection(batch, _Movable, lambda value: value.to(device))


def batch_inputs(batch: Any, inputs: Callable[[Any], Any] | None = None) -> Inputs:
    """Positional and keyword arguments of a network: a tensor, the first element of a tuple or list, or a mapping.

    Args:
        batch: What a data loader gave.
        inputs: Function from a batch to a tensor, a tuple of positional arguments or a dictionary of keyword arguments.
            None uses the rule above.

    Raises:
        TypeError: If the batch has none of these forms.

    Example:
        >>> import torch
        >>> batch_inputs((torch.zeros(2, 3), torch.zeros(2)))
        ((tensor([[0., 0., 0.],
                [0., 0., 0.]]),), {})
    """
    if inputs is not None:
        batch = inputs(batch)
        if isinstance(batch, tuple):
            return batch, {}
    elif isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    raise TypeError(
        "Expected the inputs of the student to be a tensor, the first element of a tuple or a mapping of keyword "
        f"arguments, but got {type(batch).__name__}. Pass `inputs=`, a function from a batch to a tensor, a tuple or a "
        "dictionary."
    )


def check_accepted(model: nn.Module, inputs: Inputs) -> None:
    """Check that the forward of a network takes these arguments.

    Raises:
        TypeError: If it does not, as where a batch is a mapping that holds labels, too.

    Example:
        >>> check_accepted(nn.Linear(2, 2), ((), {"image": torch.zeros(1, 2)}))
        Traceback (most recent call last):
            ...
        TypeError: Linear.forward(input) does not take ['image'] of the batch: ...
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # no Python function, such as that of a TorchScript module
        return
    args, kwargs = inputs
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        names = ", ".join(signature.parameters)
        raise TypeError(
            f"{type(model).__name__}.forward({names}) does not take {list(kwargs) or len(args)} of the batch: {error}. "
            "Pass `inputs=`, a function from a batch to a tensor, a tuple or a dictionary."
        ) from None
