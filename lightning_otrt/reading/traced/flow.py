"""Which layers lead to a tensor through code: their outputs enter it, and no layer with weights stands between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Flow"]


class Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows tensors through all operations of a forward that runs inside of it.

    The names of modules are those that lead to a tensor without a layer with weights between, such as the convolution
    whose output was viewed, added to another one and put into a list.

    ``torch.overrides.TorchFunctionMode`` would be public, but modules such as ``nn.TransformerEncoder`` take other code
    while one is active.

    Example:
        >>> import torch
        >>> with Flow() as flow:
        ...     made = torch.ones(2, 3)
        ...     flow.enter([made], {"conv"})
        ...     computed = made.mT.flatten() + 1
        >>> sorted(flow.sources([computed]))
        ['conv']
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources: Any = WeakTensorKeyDictionary()  # sets of names by tensor

    def enter(self, made: Iterable[Tensor], names: Iterable[str]) -> None:
        """Note that these modules, and no earlier ones, lead to these tensors."""
        for tensor in made:
            self._sources[tensor] = frozenset(names)

    def sources(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        """The modules that lead to any of these tensors."""
        return frozenset().union(*(self._sources.get(tensor, ()) for tensor in tensors))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation. What it returns, or has written to, comes from all that entered it."""
        output = func(*args, **(kwargs or {}))
        names = self.sources(_tensors((args, (kwargs or {}).values())))
        if names:
            for tensor in _tensors(output):
                # An operation in place writes to the tensor of which this one is a view, too.
                for written in (tensor, tensor._base):
                    if written is not None:
                        self._sources[written] = names | self._sources.get(written, frozenset())
        return output


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments, or results, of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, str) and isinstance(value, Iterable):
        for item in value:
            yield from _tensors(item)
