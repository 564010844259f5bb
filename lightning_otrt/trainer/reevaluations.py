"""Which terms belong to a batch that an optimizer evaluates again, under manual optimization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["Reevaluations"]


class Reevaluations:
    """Watches optimizers that get a closure, as LBFGS does: all but its first evaluation in a step are of one batch.

    Example:
        >>> import torch
        >>> weight, found, again = torch.zeros(1, requires_grad=True), [], Reevaluations()
        >>> optimizer = torch.optim.LBFGS([weight], max_iter=2)
        >>> again.watch([optimizer])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     found.append(again.count())
        ...     loss = (weight - 1).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        >>> found[:2], again.count()
        ([False, True], False)
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        #: The number of terms in the step that an optimizer takes now; None outside of one.
        self._terms: int | None = None

    def watch(self, optimizers: Iterable[Any]) -> None:
        """Put hooks on the optimizers, unless there are some. Called before each training step."""
        self._terms = None  # a closure that raised an error left its step open
        if not self._handles:
            for optimizer in optimizers:
                if isinstance(optimizer, Optimizer):
                    self._handles.append(optimizer.register_step_pre_hook(self._begin))
                    self._handles.append(optimizer.register_step_post_hook(self._end))

    def count(self) -> bool:
        """Count a term, and say whether it is one of a batch that was evaluated before."""
        if self._terms is None:
            return False
        self._terms += 1
        return self._terms > 1

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._terms = [], None

    def _begin(self, *arguments: Any) -> None:
        self._terms = 0

    def _end(self, *arguments: Any) -> None:
        self._terms = None
