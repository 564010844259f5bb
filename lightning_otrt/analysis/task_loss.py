"""The loss of the task on one batch, without a Trainer, from whatever the user gives to compute it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["find_task_loss"]


def find_task_loss(
    student: nn.Module, task_loss: Callable[[Any], Tensor] | None, loss_fn: Callable[[Any, Any], Tensor] | None
) -> Callable[[Any], Tensor]:
    """A function from a batch to the loss of the task, a scalar with gradient.

    Args:
        student: The network, or the LightningModule whose ``training_step`` is used where nothing else is given.
        task_loss: Function from a batch to the loss.
        loss_fn: Called as ``loss_fn(student(x), y)`` for batches ``(x, y)``.

    Returns:
        The function. It raises a TypeError where the result is not a scalar loss with gradient, or the batch or the
        module cannot be used this way.

    Raises:
        TypeError: If both functions are given, or no loss can be computed from what is given.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> loss_of = find_task_loss(nn.Linear(4, 3), None, nn.functional.cross_entropy)
        >>> loss_of((torch.zeros(2, 4), torch.tensor([0, 2]))).shape
        torch.Size([])
    """
    if task_loss is not None and loss_fn is not None:
        raise TypeError("Expected one of `task_loss` and `loss_fn`, but got both.")
    if task_loss is not None:
        compute, name = task_loss, "task_loss"
    elif loss_fn is not None:
        compute, name = _with_loss_fn(student, loss_fn), "loss_fn"
    elif callable(getattr(student, "training_step", None)):
        compute, name = _with_training_step(student), "training_step"
    else:
        raise TypeError(
            f"{type(student).__name__} has no `training_step`, so its loss is not known: pass `loss_fn`, called as "
            "loss_fn(student(x), y), or `task_loss`, called with a batch."
        )

    def checked(batch: Any) -> Tensor:
        loss = compute(batch)
        loss = loss.get("loss") if isinstance(loss, Mapping) else loss
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            if isinstance(loss, Tensor) and not loss.requires_grad:
                got += " without gradient (is the student frozen?)"
            raise TypeError(f"Expected `{name}` to return a scalar loss with gradient, but got {got}.")
        return loss.reshape(())

    return checked


def _with_loss_fn(student: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> Callable[[Any], Tensor]:
    def compute(batch: Any) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                f"Expected batches (x, y) for `loss_fn`, but got {type(batch).__name__}. Pass `task_loss`, a function "
                "of the whole batch, instead."
            )
        return loss_fn(student(batch[0]), batch[1])

    return compute


def _with_training_step(module: Any) -> Callable[[Any], Any]:
    if not getattr(module, "automatic_optimization", True):
        raise TypeError(
            f"{type(module).__name__} uses manual optimization: its training_step needs a Trainer and returns no loss. "
            "Pass `task_loss`, a function from a batch to the loss."
        )
    takes_index = len(inspect.signature(module.training_step).parameters) > 1

    def compute(batch: Any) -> Any:
        # Without a Trainer there is no logger, and Lightning warns at each call of `log`.
        silenced = {name: lambda *args, **kwargs: None for name in ("log", "log_dict") if name not in vars(module)}
        vars(module).update(silenced)
        try:
            return module.training_step(batch, 0) if takes_index else module.training_step(batch)
        except RuntimeError as error:
            if "Trainer" not in str(error):
                raise
            raise TypeError(
                f"The training_step of {type(module).__name__} needs a Trainer: {error} Pass `task_loss`, a function "
                "from a batch to the loss of the task."
            ) from error
        finally:
            for name in silenced:
                del vars(module)[name]

    return compute
