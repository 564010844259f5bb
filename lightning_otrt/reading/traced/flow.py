"""Which layers lead to a tensor through code: their outputs enter it, and no layer with weights stands between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_otrt.reading.traced.picks import Picks

__all__ = ["Flow"]


class Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows tensors through all operations of a forward that runs inside of it.

    The names of modules are those that lead to a tensor without a layer with weights between, such as the convolution
    whose output was viewed, added to another one and put into a list.

    ``torch.overrides.TorchFunctionMode`` would be public, but modules such as ``nn.TransformerEncoder`` take other code
    while one is active.

    Attributes:
        picks: Follows the positions that the network picks.
        moved_rows: Sizes of the first axis of tensors whose rows may have been put into other places.

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
        self.moved_rows: set[int] = set()
        self.picks = Picks()

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
        if isinstance(output, Tensor) and not output.is_nested and output.dim() and _moves_rows(func, args):
            self.moved_rows.add(output.shape[0])
        entered = list(_tensors((args, (kwargs or {}).values())))
        names = self.sources(entered)
        self.picks.note(func, args, entered, list(_tensors(output)), is_computed=bool(names))
        if names:
            for tensor in _tensors(output):
                # An operation in place writes to the tensor of which this one is a view, too.
                for written in (tensor, tensor._base):
                    if written is not None:
                        self._sources[written] = names | self._sources.get(written, frozenset())
        return output


def _moves_rows(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation may put the rows of a tensor into another order: by indices, or from parts."""
    if func.namespace != "aten":  # an operation of other code may have the same name
        return False
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_"):
        return args[1][0] is not None and args[1][0].dtype is not torch.bool
    if name in ("index_select", "gather", "index_copy", "index_copy_", "scatter", "scatter_"):
        return bool(args[1] in (0, -args[0].dim()))
    if name in ("flip", "roll"):
        axes = args[1] if name == "flip" else args[2] if len(args) > 2 else ()
        return not axes or 0 in axes or -args[0].dim() in axes
    if name in ("cat", "stack"):
        dims = args[0][0].dim() + (name == "stack")
        return len(args[0]) > 1 and (len(args) == 1 or args[1] in (0, -dims))
    return False


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors among the arguments, or results, of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, str) and isinstance(value, Iterable):
        for item in value:
            yield from _tensors(item)
