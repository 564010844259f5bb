"""Positions that a network picks by scores of its own, as a detector picks its queries among those of an encoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Picks"]

#: Operations that bring indices into another form.
_SAME_INDICES = {
    *("unsqueeze", "squeeze", "view", "_unsafe_view", "reshape", "expand", "repeat", "slice", "select", "clone"),
    *("alias", "detach", "_to_copy", "transpose", "t", "permute", "cat", "add", "floor_divide", "div"),
}


class _Pick(NamedTuple):
    """What was picked ``(B, Q)``, and how many positions the tensor has, which may have others beside them."""

    chosen: Tensor
    size: int


class Picks:
    """Follows what a network picks, through all operations of a forward.

    Picked are positions of ``(B, T, C)``, fewer than T in each sample, by ``gather`` or by indexing, where ``topk`` or
    ``sort`` of what layers computed gave the indices. What comes from them is followed while it has as many
    positions.
    """

    def __init__(self) -> None:
        self._indices: Any = WeakTensorKeyDictionary()  # True by tensor
        self._picked: Any = WeakTensorKeyDictionary()  # a pick by tensor

    def note(
        self, func: Any, args: tuple[Any, ...], entered: list[Tensor], made: list[Tensor], *, is_computed: bool
    ) -> None:
        """Note an operation.

        Args:
            func: The operation.
            args: Its positional arguments.
            entered: All tensors among its arguments.
            made: The tensors that it returned.
            is_computed: Whether layers lead to it. An order of inputs or of constants is the same in two networks.
        """
        name = func.overloadpacket.__name__ if func.namespace == "aten" else ""
        if not entered or not made:
            return
        if name in ("topk", "sort"):
            values, indices = made
            if entered[0] in self._indices:
                self._indices[values] = True
            elif entered[0].is_floating_point() and is_computed:
                self._indices[indices] = True
        elif name in _SAME_INDICES and not made[0].is_floating_point():
            if any(tensor in self._indices for tensor in entered):
                self._indices[made[0]] = True
        elif name in ("gather", "index") and (chosen := self._chosen(name, args)) is not None:
            self._picked[made[0]] = _Pick(chosen, chosen.shape[1])
        else:
            self._follow(name, entered, made)

    def positions(self, tensor: Tensor) -> tuple[tuple[int, ...], ...]:
        """Which positions of each sample a tensor ``(B, Q, C)`` has; nothing where none are known to be picked.

        It waits for the device.
        """
        pick = self._picked.get(tensor)
        if pick is None or tensor.dim() != 3 or pick.size != tensor.shape[1]:
            return ()
        return tuple(map(tuple, pick.chosen.tolist()))

    def _chosen(self, name: str, args: tuple[Any, ...]) -> Tensor | None:
        """The indices ``(B, Q)`` of an operation that picks fewer positions than there are; None for others."""
        source = args[0]
        if name == "gather":
            index = args[2] if args[1] in (1, 1 - source.dim()) else None
        else:
            index = args[1][1] if len(args[1]) == 2 and args[1][0] is not None else None
        if index is None or index not in self._indices or source.dim() != 3 or index.dim() not in (2, 3):
            return None
        if index.dim() == 3 and name == "index":  # neighbours of each position
            return None
        chosen: Tensor = index if index.dim() == 2 else index[..., 0]
        return chosen.clone() if chosen.shape[1] < source.shape[1] else None

    def _follow(self, name: str, entered: list[Tensor], made: list[Tensor]) -> None:
        pick = next((self._picked[tensor] for tensor in entered if tensor in self._picked), None)
        if pick is None:
            return
        for tensor in _written(made):
            if name == "cat" and tensor.dim() == 3 and pick.size != tensor.shape[1]:
                self._picked[tensor] = pick._replace(size=tensor.shape[1])
            elif not {pick.size, pick.size * len(pick.chosen)}.isdisjoint(tensor.shape):  # or of all samples together
                self._picked[tensor] = pick


def _written(made: list[Tensor]) -> Iterator[Tensor]:
    """Tensors with those of which they are views: an operation in place writes to these, too."""
    for tensor in made:
        yield tensor
        if tensor._base is not None:
            yield tensor._base
