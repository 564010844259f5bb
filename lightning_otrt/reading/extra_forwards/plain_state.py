"""State of a model that is neither parameter nor buffer: plain attributes, and what hooks of users write to."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable
from types import BuiltinMethodType, CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_otrt.random_numbers import Generator, generator_state, is_generator, set_generator_state
from lightning_otrt.reading.extra_forwards.plain_values import BYTES, keep_array, keep_bytes, slots
from lightning_otrt.reading.torch_internals import all_buffers, forward_hook_tables, version_of

__all__ = ["PlainState"]

#: Code whose objects are left alone: they have internal counters and caches that a forward may change.
_FOREIGN = ("torch", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_otrt", "deepspeed", "unittest")
#: Modules that manage weights across processes.
_MANAGED = ("torch.distributed", "torch.nn.parallel", "torch._dynamo", "deepspeed")
#: What ``nn.Module`` itself keeps in the dictionary of a module.
_OF_MODULES = frozenset(vars(nn.Module()))
_CONSTANT = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, nn.Parameter)
#: Containers with more items are restored, but what their items hold is not looked at.
_LONG = 10_000
#: What stands for the value of a slot that has none.
_EMPTY = object()
#: Objects inside objects are followed so far.
_DEPTH = 5


class PlainState:
    """What plain attributes of modules hold, and what their forward hooks can write to; :meth:`restore` sets it back.

    A hidden state in an attribute, a counter, a list in which a hook collects features: a forward changes all of these.
    Lists, dictionaries, sets, objects, and tensors, arrays and random number generators inside of them are restored in
    place, since others may hold them too. Not restored are global names and attributes of classes that a forward writes
    to, iterators and files.

    Args:
        modules: The modules.

    Attributes:
        generators: The random number generators that were found.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> net.seen = seen = [1]
        >>> state = PlainState([net])
        >>> net.seen.append(2)
        >>> net.steps = 1
        >>> state.restore()
        >>> seen, hasattr(net, "steps")
        ([1], False)
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}
        self.generators: list[Generator] = []
        modules = list(modules)
        if any(_is_from(type(module), "torch.distributed", "deepspeed") for module in modules):
            return  # weights that are gathered for a forward stand in plain attributes
        for module in modules:
            self._seen.update({id(buffer): buffer for buffer in all_buffers(module).values()})
        for module in modules:
            self._visit(module, 0)
        for module in modules:
            for table in forward_hook_tables(module):
                self._visit_all(list(table.values()), 0)
                # A forward that registers hooks notes in an attribute that it did: both are forgotten.
                self._undo.append(_forget_new(table))

    def restore(self) -> None:
        """Set everything back to what it was."""
        for undo in self._undo:
            undo()

    def _visit(self, value: Any, depth: int) -> None:
        if isinstance(value, _CONSTANT) or id(value) in self._seen or depth > _DEPTH:
            return
        self._seen[id(value)] = value  # kept alive: another object could get the same id
        if isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, (list, deque, set, dict)):
            self._keep_container(value, depth)
        elif isinstance(value, (tuple, frozenset)):
            self._visit_all(value, depth)
        elif is_generator(value):
            self.generators.append(value)
            self._undo.append(functools.partial(set_generator_state, value, generator_state(value)))
        elif isinstance(value, BYTES):
            self._undo.append(keep_bytes(value))
        elif isinstance(value, np.ndarray):
            self._keep_array(value, depth)
        elif isinstance(value, (MethodType, BuiltinMethodType)):
            self._visit(value.__self__, depth)
            self._visit(getattr(value, "__func__", None), depth)
        elif isinstance(value, functools.partial):
            self._visit_all((value.func, *value.args, *value.keywords.values()), depth)
        elif isinstance(value, FunctionType):
            self._keep_function(value, depth)
        elif isinstance(value, nn.Module):
            if not _is_from(type(value), *_MANAGED):
                self._keep_names(vars(value), [name for name in vars(value) if name not in _OF_MODULES], depth)
                self._undo.append(_forget_new(vars(value)))
        elif not _is_from(type(value), *_FOREIGN):
            self._keep_object(value, depth + 1)

    def _visit_all(self, values: Iterable[Any], depth: int) -> None:
        for value in values:
            self._visit(value, depth)

    def _keep_names(self, names: dict[str, Any], kept: Iterable[str], depth: int) -> None:
        """Restore these entries of a dictionary of attributes or global names, and what they hold."""
        saved = {name: names[name] for name in kept}

        def undo() -> None:
            for name, value in saved.items():
                if name not in names or names[name] is not value:
                    names[name] = value

        self._undo.append(undo)
        self._visit_all(saved.values(), depth)

    def _keep_container(self, container: Any, depth: int) -> None:
        is_dict = isinstance(container, dict)
        saved = list(container.items()) if is_dict else list(container)

        def undo() -> None:
            now = list(container.items()) if is_dict else list(container)
            parts = [part for item in now for part in item] if is_dict else now
            before = [part for item in saved for part in item] if is_dict else saved
            if len(parts) == len(before) and all(one is other for one, other in zip(parts, before, strict=True)):
                return
            container.clear()
            (container.update if isinstance(container, (dict, set)) else container.extend)(saved)

        self._undo.append(undo)
        if len(saved) <= _LONG:
            self._visit_all((value for _, value in saved) if is_dict else saved, depth)

    def _keep_object(self, value: Any, depth: int) -> None:
        """The attributes of an object, in its dictionary and in slots."""
        if hasattr(value, "__dict__"):
            self._keep_names(vars(value), list(vars(value)), depth)
            self._undo.append(_forget_new(vars(value)))
        for slot in slots(value):
            self._keep_slot(value, slot, depth)

    def _keep_slot(self, value: Any, slot: MemberDescriptorType, depth: int) -> None:
        saved = _in_slot(value, slot)

        def undo() -> None:
            now = _in_slot(value, slot)
            if now is saved:
                return
            if saved is _EMPTY:
                slot.__delete__(value)
            else:
                slot.__set__(value, saved)

        self._undo.append(undo)
        self._visit(saved, depth)

    def _keep_array(self, value: np.ndarray[Any, Any], depth: int) -> None:
        if (undo := keep_array(value)) is not None:
            self._undo.append(undo)
        if value.dtype.hasobject and value.size <= _LONG:
            self._visit_all(value.reshape(-1).tolist(), depth)
        if hasattr(value, "__dict__"):  # of a class that is derived from it, such as a masked array
            self._keep_object(value, depth + 1)

    def _keep_tensor(self, tensor: Tensor) -> None:
        if tensor.is_inference() or tensor.is_meta:
            return
        version, saved = version_of(tensor), tensor.detach().clone()

        def undo() -> None:
            if version_of(tensor) != version:
                tensor.data.copy_(saved)  # a leaf that requires a gradient takes no other write in place

        self._undo.append(undo)

    def _keep_function(self, function: FunctionType, depth: int) -> None:
        """What a function can write to: its closure, its defaults, and the global names in its code."""
        if (function.__module__ or "").partition(".")[0] in _FOREIGN:
            return
        for cell in function.__closure__ or ():
            self._keep_cell(cell, depth)
        self._visit_all((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()), depth)
        names = function.__globals__
        used = [name for name in function.__code__.co_names if name in names]
        kept = [name for name in used if not isinstance(names[name], (type, ModuleType, FunctionType))]
        self._keep_names(names, kept, depth)

    def _keep_cell(self, cell: CellType, depth: int) -> None:
        try:
            value = cell.cell_contents
        except ValueError:  # it is empty
            return

        def undo() -> None:
            cell.cell_contents = value

        self._undo.append(undo)
        self._visit(value, depth)


def _in_slot(value: Any, slot: MemberDescriptorType) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:
        return _EMPTY


def _forget_new(attributes: dict[Any, Any]) -> Callable[[], None]:
    """Deletes the attributes or hooks that come later."""
    before = frozenset(attributes)

    def undo() -> None:
        for name in attributes.keys() - before - _OF_MODULES:
            del attributes[name]

    return undo


def _is_from(kind: type, *packages: str) -> bool:
    """Whether a type, or for modules one that it is derived from, is defined in one of these packages."""
    bases = kind.__mro__ if issubclass(kind, nn.Module) else (kind,)
    return any(f"{base.__module__}.".startswith(f"{package}.") for base in bases for package in packages)
