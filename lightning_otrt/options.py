"""The options of a transfer: their types and checks, which of them may change, and how they are shown."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable, Iterable
from enum import Enum
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from lightning_otrt.checks import (
    check_callable,
    check_count,
    check_decay,
    check_flag,
    check_name,
    check_number,
    check_seed,
)
from lightning_otrt.distillation import LogitDistillation, check_distillation
from lightning_otrt.layers.grammar import parse_layers
from lightning_otrt.schedules import Schedule
from lightning_otrt.teacher.cache.options import TeacherCache, parse_cache
from lightning_otrt.transport.plans import check_epsilon, check_plan

__all__ = [
    "FixedOptions",
    "OPTIONS",
    "TransferOptions",
    "as_written",
    "check_option_names",
    "check_spelling",
    "is_own",
    "takes_options_of",
]

Function = TypeVar("Function", bound=Callable[..., Any])


class TransferOptions(TypedDict, total=False):
    """The keyword options that ``OTRTCallback`` and ``OTRTModule`` pass on to ``RepresentationTransfer``.

    That class documents them and has their defaults. Its ``process_group`` is missing here: a Trainer's strategy knows
    which processes share a batch.
    """

    weight: float
    student_root: str | None
    cost: str | Callable[[Tensor, Tensor], Tensor]
    plan: str
    epsilon: float
    memory: float | str
    solve_every: int
    grid: int | None
    schedule: Schedule | None
    distillation: float | LogitDistillation
    teacher_inputs: Callable[..., Any] | None
    teacher_dtype: torch.dtype | str | None
    teacher_cache: TeacherCache | str | os.PathLike[str] | None
    global_batch: bool | None
    strict: bool
    seed: int


#: All arguments of a transfer, and those of them that may be set again.
OPTIONS = ("teacher", "layers", *TransferOptions.__annotations__, "process_group")
CHANGEABLE = ("weight", "schedule")
#: From 0 to 1, how like an option the name of an attribute must be to be taken for it (`difflib`).
ALIKE = 0.82


def _check_global_batch(value: Any) -> None:
    if value is not None:
        check_flag("global_batch", value, "None, the default, means: wherever several processes train together.")


#: Checks of single options. The teacher, the cost and the names of layers are checked where they are used.
_CHECKS: dict[str, Callable[[Any], object]] = {
    "layers": parse_layers,
    "weight": lambda value: check_number("weight", value, "It is the factor α on the term; 0 switches the term off."),
    "student_root": lambda value: check_name(
        "student_root",
        value,
        "It names the module of the student whose inputs the teacher gets, too: pass its name, such as 'net'.",
    ),
    "plan": check_plan,
    "epsilon": check_epsilon,
    "memory": lambda value: check_decay("memory", value, '`plan="static"` keeps one plan from everything seen.'),
    "solve_every": lambda value: check_count(
        "solve_every", value, "It is the number of calls between two solves of the plan; 1 solves at each call."
    ),
    "grid": lambda value: check_count(
        "grid", value, "It is the number of positions along each axis of a feature map; None keeps all.", optional=True
    ),
    "schedule": lambda value: check_callable(
        "schedule",
        value,
        "It maps the step to a factor on the weights of both terms: pass LinearWarmup(steps) or a function.",
    ),
    "distillation": check_distillation,
    "teacher_inputs": lambda value: check_callable(
        "teacher_inputs", value, "It makes the teacher's inputs from those of the student's root: pass a function."
    ),
    "teacher_cache": parse_cache,
    "global_batch": _check_global_batch,
    "strict": lambda value: check_flag("strict", value, "It says whether a step without a term is an error."),
    "seed": lambda value: check_seed("seed", value, 'It seeds `plan="random"` and `plan="random_orthogonal"`.'),
}


class FixedOptions:
    """Base of ``RepresentationTransfer``: its arguments are properties, and ``repr`` is the constructor call.

    Options are checked where they are set. Most of them can be set only once, by the constructor.
    """

    layers: Any
    #: The teacher as the user wrote it.
    _teacher_text: str

    def _option_changed(self) -> None:
        """An option was set again."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an option or another attribute, but no misspelt option."""
        if name not in vars(self) and not hasattr(type(self), name):
            check_spelling(self, name)
        super().__setattr__(name, value)

    def __copy__(self) -> Any:
        """Two transfers cannot share plans and weights."""
        raise TypeError(f"A {type(self).__name__} has no shallow copies. Use `copy.deepcopy`, or make a new one.")

    def __repr__(self) -> str:
        """The constructor call, with the options that differ from their defaults."""
        return self.constructor_call(type(self).__name__)

    def constructor_call(self, name: str) -> str:
        """The call of ``name`` with the same teacher, layers and options; defaults are left out."""
        arguments = [self._teacher_text]
        if not _is_default(self.layers, "auto"):
            arguments.append(as_written(self.layers))
        # A subclass may have another signature.
        owner = next(cls for cls in type(self).__mro__ if FixedOptions in cls.__bases__)
        for option, parameter in inspect.signature(owner).parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                value = getattr(self, option)
                if not _is_default(value, parameter.default):
                    arguments.append(f"{option}={as_written(value)}")
        return f"{name}({', '.join(arguments)})"


def _option(name: str) -> property:
    """The property of an option, which checks what is set."""
    attribute, check = f"_{name}", _CHECKS.get(name)

    def set_option(transfer: FixedOptions, value: Any) -> None:
        is_new = attribute not in vars(transfer)
        if not is_new and name not in CHANGEABLE:
            raise AttributeError(
                f"`{name}` of a {type(transfer).__name__} cannot be changed, since layers, plans and statistics follow "
                f"from it. Make a new one with the other `{name}`. Only {' and '.join(map(repr, CHANGEABLE))} can be "
                "set at any time."
            )
        if check is not None:
            check(value)
        vars(transfer)[attribute] = value
        if not is_new:
            transfer._option_changed()

    text = "It may be set at any time." if name in CHANGEABLE else "It cannot be changed."
    return property(attrgetter(attribute), set_option, doc=f"The argument ``{name}``. {text}")


for _name in OPTIONS:
    setattr(FixedOptions, _name, _option(_name))


def check_option_names(caller: str, names: Iterable[str]) -> None:
    """Check the names of the options that a class passes on to ``RepresentationTransfer``.

    Args:
        caller: Name of the class that the user called.
        names: Names of the options.

    Raises:
        TypeError: If there is no such option.

    Example:
        >>> check_option_names("OTRTCallback", ["wieght"])
        Traceback (most recent call last):
            ...
        TypeError: OTRTCallback got an unexpected keyword argument 'wieght'. Did you mean 'weight'?
    """
    known = list(TransferOptions.__annotations__)
    for name in names:
        if name in known:
            continue
        hint = f". Its options: {known}."
        if name == "process_group":
            hint = ": in a Trainer the strategy says which processes share a batch. Leave it out."
        elif name in LogitDistillation.__dataclass_fields__:
            hint = f": it belongs to the distillation. Pass distillation=LogitDistillation({name}=...)."
        elif close := difflib.get_close_matches(name, known, 1):
            hint = f". Did you mean {close[0]!r}?"
        raise TypeError(f"{caller} got an unexpected keyword argument {name!r}{hint}")


def is_own(owner: object) -> bool:
    """Whether the class of an object is one of this package, and not a user's subclass."""
    return type(owner).__module__.startswith("lightning_otrt.")


def check_spelling(owner: object, name: str) -> None:
    """Refuse to set what looks like a misspelt option, which would have no effect.

    Args:
        owner: What the attribute is set on. Classes of users, which may have attributes of any name, are left alone.
        name: Name of the attribute, which is no option.

    Raises:
        AttributeError: If it is almost the name of an option.

    Example:
        >>> from lightning_otrt.distillation import LogitDistillation
        >>> check_spelling(LogitDistillation(), "wieght")
        Traceback (most recent call last):
            ...
        AttributeError: 'LogitDistillation' object has no option 'wieght'. Did you mean 'weight'?
    """
    if not is_own(owner):
        return
    if not name.startswith("_") and (close := difflib.get_close_matches(name, OPTIONS, 1, ALIKE)):
        raise AttributeError(f"{type(owner).__name__!r} object has no option {name!r}. Did you mean {close[0]!r}?")


def as_written(value: Any) -> str:
    """How an argument is written in Python: classes and functions by their names, networks as ``Name(...)``.

    Example:
        >>> from torch import nn
        >>> as_written(("teacher.ckpt", nn.Linear)), as_written(nn.Linear(2, 2)), as_written(["blocks", -1])
        ("('teacher.ckpt', Linear)", 'Linear(...)', "['blocks', -1]")
    """
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}(...)"
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, (type, FunctionType, BuiltinFunctionType, MethodType)):
        return value.__qualname__
    if type(value) is tuple:
        return f"({', '.join(map(as_written, value))}{',' if len(value) == 1 else ''})"
    if type(value) is list:
        return f"[{', '.join(map(as_written, value))}]"
    return repr(value)


def takes_options_of(
    source: type, *, without: tuple[str, ...] = (), description: str = ""
) -> Callable[[Function], Function]:
    """Show the options of a constructor in place of the ``**options`` of a function that passes them on.

    Type checkers and editors read ``Unpack[TransferOptions]``. Tools that look at the function at run time (``help``,
    Sphinx, notebooks, jsonargparse behind LightningCLI) find each option with its type, default and description.

    Args:
        source: The class with the options, which its docstring describes under ``Args:``.
        without: Options that are not passed on.
        description: What the function's own parameters mean, in the form of a docstring.

    Returns:
        A decorator. Parameters that both have, such as the teacher, get the type that ``source`` gives them.
    """
    types = get_type_hints(source.__init__)  # type: ignore[misc]
    options = [
        parameter.replace(annotation=types[name])
        for name, parameter in inspect.signature(source).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in without
    ]
    described = inspect.cleandoc(source.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    for name in without:
        # From its name to the next one.
        described = re.sub(rf"^    {name}:.*?(^    (?=\w)|\Z)", r"\1", described, flags=re.MULTILINE | re.DOTALL)

    def decorate(function: Function) -> Function:
        own = [
            parameter.replace(annotation=types.get(name, parameter.annotation))
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        function.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        head = inspect.cleandoc(function.__doc__ or "Make one.")
        function.__doc__ = "\n".join([head, "", "Args:", *([f"    {description}"] if description else []), described])
        return function

    return decorate


def _is_default(value: Any, default: Any) -> bool:
    # Objects of users may compare in ways of their own, so only plain values are compared.
    return value is default or (isinstance(value, (int, float, str)) and bool(value == default))
