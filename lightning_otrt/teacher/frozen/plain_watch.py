"""Notices that a teacher computes something else than before: other code, plain attributes or hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
from torch import nn

from lightning_otrt.reading.torch_internals import add_forward_hook, add_forward_pre_hook, module_tables
from lightning_otrt.teacher.frozen.plain_facts import plain_facts, tensor_attributes

__all__ = ["STEPS_BETWEEN_LOOKS", "PlainWatch"]

#: Steps between two looks at everything, which take some ten milliseconds for a large network.
STEPS_BETWEEN_LOOKS = 100
#: What cannot hold an activation.
_HELD = (bool, int, float, complex, str, bytes, type(None), type, np.generic)


class PlainWatch:
    """What decides on the output of a network besides its tensors, without what its own forward changes.

    A counter, or what a hook collects, changes in each forward and decides on nothing.

    Args:
        module: The network.

    Attributes:
        module: The network.
        changing: Names of what forwards change, and what does not count.

    Example:
        >>> net = nn.TransformerEncoderLayer(8, 2)
        >>> watch = PlainWatch(net)
        >>> watch.changed()
        []
        >>> net.self_attn.num_heads = 4
        >>> watch.changed(), watch.changed()
        (['self_attn.num_heads'], [])
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.changing: set[str] = set()
        self._read()

    def changed(self, *, everything: bool = False) -> list[str]:
        """Names of the facts that count and are others than at the last call.

        Args:
            everything: Whether to look into objects and code, too, which may change in place.
        """
        return sorted(self._new_names(everything) - self.changing)

    def learn(self, *, everything: bool = False) -> bool:
        """Note what the forward since the last call has changed. Whether that leaves less that counts."""
        names = self._new_names(everything) - self.changing
        self.changing |= names
        return bool(names)

    def __getstate__(self) -> dict[str, Any]:
        """Without the tables of the modules, which a copy of these would not share. A longer look finds them anew."""
        return {**vars(self), "_tables": [], "_last": [], "_held": [], "_alive": []}

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Learn what forwards inside the block change, although all of that is undone at its end."""
        hooks = (
            add_forward_pre_hook(self.module, _Call(self._read), prepend=True),
            add_forward_hook(self.module, _Call(self._learn_all)),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _learn_all(self) -> None:
        self.learn(everything=True)

    def _new_names(self, everything: bool = False) -> set[str]:
        """The names of all facts that are others than at the last call."""
        # An object that is gone may have left its address to another one.
        if not everything and self._look() == self._last and all(alive() is not None for alive in self._alive):
            return set()
        before = self._facts
        self._read()
        names = before.keys() | self._facts.keys()
        return {name for name in names if before.get(name) != self._facts.get(name)}

    def _read(self) -> None:
        tensors = tensor_attributes(self.module)
        self._facts = {**plain_facts(self.module), **{name: f"Tensor {id(value)}" for name, value in tensors.items()}}
        self._tables = [table for part in self.module.modules() for table in module_tables(part)]
        self._last = self._look()
        values = [*chain.from_iterable(table.values() for table in self._tables)]
        self._held = [value for value in values if isinstance(value, _HELD)]
        self._alive = [*filter(None, map(_reference, values))]

    def _look(self) -> list[int]:
        """Which objects the attributes and hooks are, in a fraction of a millisecond.

        Numbers and texts are held, so that no other object gets their address. Of others it is only known whether they
        are alive: to hold them would keep activations. Of lists, tuples and dictionaries not even that, and one that
        code writes to stays the same object: what changes there shows in a longer look.
        """
        return [*map(id, chain.from_iterable(table.values() for table in self._tables))]


def _reference(value: Any) -> weakref.ref[Any] | None:
    """A reference that does not hold an object; None for what is held, and where there can be none."""
    try:
        return None if isinstance(value, _HELD) else weakref.ref(value)
    except TypeError:
        return None


class _Call:
    """A hook that calls a function without arguments."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> None:
        """The hook."""
        self._function()
