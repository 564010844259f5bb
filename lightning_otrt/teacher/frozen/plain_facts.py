"""What decides on the output of a network besides its tensors, as text: its code, plain attributes and hooks."""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_otrt.reading.torch_internals import forward_hook_tables, lightning_base

__all__ = ["plain_facts", "tensor_attributes"]

#: Code that is known by its name: that of the standard library, and of packages whose objects have internal counters
#: and caches that a forward may change.
_FOREIGN = frozenset(
    (*sys.stdlib_module_names, "torch", "numpy", "lightning", "lightning_fabric", "pytorch_lightning", "lightning_otrt")
)
#: Plain holders of settings in the standard library.
_HOLDERS = (Namespace, SimpleNamespace)
#: Packages of which a value is seen by what `pickle` would keep of it: a fraction, a date, a distribution.
_OF_VALUES = (*(sys.stdlib_module_names - {"random"}), "numpy")
_CONSTANT = (bool, int, float, complex, str, bytes, type(None), torch.dtype, range, slice, np.generic)
#: Folders of packages that are installed.
_INSTALLED = ("site-packages", "dist-packages")
#: What ``nn.Module`` itself keeps in the dictionary of a module, and what Lightning's `torch.compile` adds.
_OF_MODULES = frozenset((*vars(nn.Module()), "_is_torch_compile", "_compile_kwargs"))
#: Of longer containers the length counts, of larger tensors the shape, and of objects deeper in others the type.
_LONG, _LARGE, _DEPTH = 10_000, 64, 6


def plain_facts(module: nn.Module) -> dict[str, str]:
    """What a network computes, by names of its modules and their attributes: equal texts in each process.

    It sees the code of the classes and functions that are not part of Python or torch, numbers, texts and flags,
    containers and objects that hold these, and forward hooks of users. Of tensors inside of these it sees the shape,
    and up to 64 values of one on the CPU.

    Args:
        module: The network.

    Example:
        >>> one, other = nn.TransformerEncoderLayer(8, 2), nn.TransformerEncoderLayer(8, 4)
        >>> [name for name, fact in plain_facts(one).items() if plain_facts(other)[name] != fact]
        ['self_attn.num_heads', 'self_attn.head_dim']
    """
    facts: dict[str, str] = {}
    describe = _Description()
    for name, part in module.named_modules():
        facts[f"{name} (code)"] = describe.kind(type(part))
        for key, value in _held(part).items():
            if not isinstance(value, Tensor):
                facts[f"{name}.{key}".removeprefix(".")] = describe(value)
        if isinstance(part, torch.fx.GraphModule):
            facts[f"{name} (graph)"] = part.code
    return {**facts, **describe.used()}


def tensor_attributes(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that are kept as public plain attributes, as some normalisations do, by the same names."""
    return {
        f"{name}.{key}".removeprefix("."): value
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, Tensor) and not key.startswith("_")
    }


def _held(part: nn.Module) -> dict[str, Any]:
    """Attributes and hooks of a module by name, as far as they are not those of PyTorch, of Lightning or ours."""
    if isinstance(part, torch.jit.ScriptModule):
        return {}  # a fingerprint reads its graph; its dictionary holds what was looked up so far
    held = {key: value for key, value in vars(part).items() if key not in _OF_MODULES}
    if (base := lightning_base(type(part))) is not None:
        held = {key: value for key, value in held.items() if key not in _of_lightning(base)}
    before, after = forward_hook_tables(part)[:2]
    for when, table in (("before", before), ("after", after)):
        hooks = [hook for hook in table.values() if not _is_from(type(hook), "lightning_otrt")]
        held.update({f"hook {place} {when} the forward": hook for place, hook in enumerate(hooks)})
    return held


@functools.cache
def _of_lightning(base: type) -> frozenset[str]:
    """What Lightning keeps in attributes, such as its Trainer. The hyperparameters count, as they are now."""
    return frozenset((*vars(base()), "_hparams_initial", "_hparams_name"))


class _Description:
    """Describes values. Equal values have equal texts, whether they are one object or several."""

    def __init__(self) -> None:
        # With the objects, which are kept alive: another one could get the same id.
        self._known: dict[tuple[int, int], tuple[Any, str]] = {}
        self._running: set[int] = set()
        self._kinds: dict[type, str] = {}
        # Code that functions use, by module and name; each is described once, however long the way to it is.
        self._used: dict[str, FunctionType | type] = {}

    def used(self) -> dict[str, str]:
        """The functions and classes that what was described so far uses by global names, and those that they use."""
        facts: dict[str, str] = {}
        while waiting := self._used.keys() - facts.keys():
            for name in sorted(waiting):
                facts[name] = self(self._used[name])
        return {f"{name} (used)": fact for name, fact in facts.items()}

    def __call__(self, value: Any, depth: int = 0) -> str:
        """A text that is equal for equal values."""
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if isinstance(value, _CONSTANT):
            return repr(value)
        if isinstance(value, torch.device):
            return "device"
        if isinstance(value, Tensor):
            is_small = (
                type(value) in (Tensor, nn.Parameter)
                and value.device.type == "cpu"
                and value.layout is torch.strided
                and value.numel() <= _LARGE
            )
            values = f" {value.tolist()}" if is_small and not value.is_quantized else ""
            return f"Tensor {tuple(value.shape)} {value.dtype}{values}"
        if isinstance(value, type):
            return self.kind(value)
        if id(value) in self._running or depth > _DEPTH:  # it holds itself, perhaps
            return type(value).__qualname__
        place = id(value), depth
        if place not in self._known:
            self._running.add(id(value))
            # However many decorators a function has, its code counts.
            self._known[place] = value, self._object(value, depth + (not isinstance(value, FunctionType)))
            self._running.discard(id(value))
        return self._known[place][1]

    def kind(self, kind: type) -> str:
        """A class by name, and by its code if it is of the user or of a package of networks."""
        if kind not in self._kinds:
            self._kinds[kind] = kind.__qualname__
            bases = () if _is_from(kind, *_FOREIGN) else kind.__mro__
            own = [base for base in bases if not _is_from(base, *_FOREIGN)]
            facts = [
                f"{name}={self(getattr(value, 'fget', None) or getattr(value, '__func__', value))}"
                for base in own
                for name, value in sorted(vars(base).items())
                if not (name.startswith("__") and name.endswith("__") and not callable(value))
            ]
            self._kinds[kind] = f"{kind.__module__}.{kind.__qualname__} {_digest(facts)}" if own else kind.__qualname__
        return self._kinds[kind]

    def _object(self, value: Any, depth: int) -> str:
        if isinstance(value, (list, tuple, set, frozenset, deque, Mapping)):
            return self._container(value, depth)
        if isinstance(value, np.ndarray):
            return f"array {value.shape} {value.dtype} {_digest([repr(value.tolist())])}"
        if isinstance(value, functools.partial):
            return f"partial {self._all((value.func, value.args, value.keywords), depth)}"
        if isinstance(value, MethodType):
            # A module that holds its own method would hold itself.
            is_module = isinstance(value.__self__, (nn.Module, type))
            owner = type(value.__self__).__qualname__ if is_module else self(value.__self__, depth)
            return f"method {self(value.__func__, depth)} of {owner}"
        if isinstance(value, FunctionType):
            return self._function(value, depth)
        if isinstance(value, BuiltinFunctionType):
            return value.__qualname__
        # As by `functools.lru_cache`; static, since objects may answer to any name, or raise.
        if callable(wrapped := inspect.getattr_static(value, "__wrapped__", None)):
            return f"{type(value).__qualname__} of {self(wrapped, depth)}"
        if isinstance(value, nn.Module):
            return _digest(f"{name}: {fact}" for name, fact in plain_facts(value).items())
        if _is_from(type(value), *_FOREIGN) and not isinstance(value, _HOLDERS):
            return f"{self.kind(type(value))}({self._kept(value, depth)})"
        return f"{self.kind(type(value))}({self._container(_attributes(value), depth)})"

    def _kept(self, value: Any, depth: int) -> str:
        """What `pickle` would keep of an object of Python, NumPy or `torch.distributions`; nothing of others."""
        module = type(value).__module__
        is_value = _top(module) in _OF_VALUES or module.startswith("torch.distributions")
        if not is_value or module.startswith("numpy.random"):  # generators change with each number
            return ""
        try:
            kept = value.__reduce_ex__(2)
        except Exception:  # a file, a lock, a thread
            return ""
        return kept if isinstance(kept, str) else self(list(kept[:3]), depth)

    def _container(self, value: Any, depth: int) -> str:
        name = type(value).__qualname__
        if len(value) > _LONG:
            return f"{name} of {len(value)}"
        if isinstance(value, Mapping):
            return f"{name} {sorted(f'{key}: {self(item, depth)}' for key, item in value.items())}"
        found = [self(item, depth) for item in value]
        return f"{name} {sorted(found) if isinstance(value, (set, frozenset)) else found}"

    def _all(self, values: Iterable[Any], depth: int) -> list[str]:
        return [self(value, depth) for value in values]

    def _function(self, function: FunctionType, depth: int) -> str:
        """A function by name, and by its code with the values that it holds and the functions that it calls."""
        name = f"{function.__module__}.{function.__qualname__}"
        if _top(function.__module__) in _FOREIGN:
            return name
        cells = function.__closure__ or ()
        held = self._all([cell.cell_contents if _is_filled(cell) else "no value yet" for cell in cells], depth)
        held += self._all([*(function.__defaults__ or ()), *sorted((function.__kwdefaults__ or {}).items())], depth)
        for used, value in _used(function).items():
            if isinstance(value, (FunctionType, type)):
                self._used[used] = value
                held.append(used)
            else:
                held.append(f"{used}={self(value, depth)}")
        return f"{name} {_digest([_code(function.__code__), *held])}"


def _used(function: FunctionType) -> dict[str, Any]:
    """What a function uses by global names: functions, classes, those of modules, and constants in capitals.

    Of a package that is installed it is functions of that package alone: there are too many others, and they change
    with its version.
    """
    found: dict[str, Any] = {}
    package = _top(function.__module__)
    names, known = sorted(_names(function.__code__)), function.__globals__
    for used in names:
        value, place = known.get(used), f"{known.get('__name__')}.{used}"
        if isinstance(value, (FunctionType, type)):
            is_near = isinstance(value, FunctionType) and _top(value.__module__) == package
            if is_near or _is_written_here(value.__module__):
                found[place] = value
        elif isinstance(value, ModuleType) and _is_written_here(value.__name__):
            inside = {f"{value.__name__}.{name}": vars(value).get(name) for name in names}
            found.update((name, part) for name, part in inside.items() if isinstance(part, (FunctionType, type)))
        elif used.isupper() and isinstance(value, (*_CONSTANT, tuple)):
            found[place] = value
    return found


@functools.cache
def _is_written_here(module: str | None) -> bool:
    """Whether a module is the user's own: no part of Python, and of no package that is installed."""
    if _top(module) in _FOREIGN:
        return False
    place = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return not any(folder in place for folder in _INSTALLED)


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds, in its dictionary and in slots."""
    slots = {name for base in type(value).__mro__ for name in vars(base).get("__slots__", ()) if hasattr(value, name)}
    return {**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})}


def _code(code: CodeType) -> str:
    """The instructions of a function, without where they stand."""
    constants = [
        _code(one) if isinstance(one, CodeType) else sorted(map(repr, one)) if isinstance(one, frozenset) else repr(one)
        for one in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars} {constants}"


def _names(code: CodeType) -> set[str]:
    """The names that a function uses, those inside of it included."""
    inner = (one for one in code.co_consts if isinstance(one, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (raises where the variable has no value yet)
    except ValueError:
        return False
    return True


def _top(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _is_from(kind: type, *packages: str) -> bool:
    return _top(kind.__module__) in packages
