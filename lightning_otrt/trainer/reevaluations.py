"""Which terms are of batches that an optimizer evaluates again, under manual optimization."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["Reevaluations"]


class Reevaluations:
    """Watches optimizers that get a closure, as LBFGS does: all but its first call in a step are of the same batches.

    A closure may have several terms, as of micro-batches.

    Example:
        >>> import torch
        >>> weight, found, again = torch.zeros(1, requires_grad=True), [], Reevaluations()
        >>> optimizer = torch.optim.LBFGS([weight], max_iter=2)
        >>> again.watch([optimizer])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     found.append(again.is_again())
        ...     loss = (weight - 1).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        >>> found[:2], again.is_again()
        ([False, True], False)
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        #: The number of calls of the closure in the step that an optimizer takes now; 0 outside of one.
        self._calls = 0

    def watch(self, optimizers: Iterable[Any]) -> None:
        """Put hooks on the optimizers, unless there are some. Called before each training step."""
        self._calls = 0  # a closure that raised an error left its step open
        if not self._handles:
            for optimizer in optimizers:
                if isinstance(optimizer, Optimizer):
                    self._handles.append(optimizer.register_step_pre_hook(self._begin))
                    self._handles.append(optimizer.register_step_post_hook(self._end))

    def is_again(self) -> bool:
        """Whether a term of now is one of a batch that was evaluated before."""
        return self._calls > 1

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls = [], 0

    def _begin(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Count the calls of the closure, wherever it stands among the arguments."""
        self._calls = 0
        return tuple(map(self._counted, args)), {name: self._counted(value) for name, value in kwargs.items()}

    def _end(self, *arguments: Any) -> None:
        self._calls = 0

    def _counted(self, value: Any) -> Any:
        if not callable(value):
            return value

        @functools.wraps(value)
        def closure(*args: Any, **kwargs: Any) -> Any:
            self._calls += 1
            return value(*args, **kwargs)

        return closure
