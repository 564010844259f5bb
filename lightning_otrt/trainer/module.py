"""Representation transfer as a wrapper around a LightningModule."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import Unpack, override

from lightning_otrt.layers.pairs import LayerSpec
from lightning_otrt.notices import rank_zero_warn
from lightning_otrt.options import TransferOptions, check_option_names, takes_options_of
from lightning_otrt.teacher.loading.load import TeacherSource
from lightning_otrt.trainer.lightning_internals import is_being_spawned
from lightning_otrt.trainer.transfer_callback import TransferCallback
from lightning_otrt.transfer import RepresentationTransfer

__all__ = ["OTRTModule"]

_CALLBACKS = "configure_callbacks"


class ModuleCallback(TransferCallback):
    """The callback of a wrapped module.

    A class of its own: a callback from ``configure_callbacks`` replaces one of the same class in the Trainer, so that a
    wrapped module and an :class:`OTRTCallback` would not go together.
    """


class OTRTModule(pl.LightningModule):
    """Wraps a LightningModule so that it trains with representation transfer wherever it is trained.

    The result *is* a module of the task's own class, with the task's own parameters, hyperparameters, metrics, hooks
    and checkpoint keys: nothing is nested. It contributes a callback through ``configure_callbacks``. After training,
    ``task`` is the trained, plain module. Deep copies, saved pickles and what ``load_from_checkpoint`` of the task's
    class gives are plain modules of that class, without the teacher; a fit of a deep copy warns of that. Wrap it again.

    It takes the task and then the arguments of :class:`OTRTCallback`; names of layers are relative to the task. From
    the YAML of LightningCLI, ``OTRTModule.load_from_checkpoint`` gives the wrapped module again, since the
    configuration that is saved is that of the wrapper.

    Returns:
        The wrapped module; ``wrapped.otrt`` is its :class:`RepresentationTransfer`. In a Trainer its callback is the
        :class:`TransferCallback` among ``trainer.callbacks``.

    Raises:
        TypeError: If ``task`` is no LightningModule of the ``lightning`` package, or an argument is of the wrong type.
        ValueError: If an argument is out of range; in ``fit`` as for :class:`OTRTCallback`.
        MisconfigurationException: If ``task`` is wrapped already.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from torch import nn
        >>> from lightning_otrt import OTRTModule
        >>> task = BoringModel()
        >>> wrapped = OTRTModule(task, teacher=nn.Linear(32, 2), layers={"layer": ""}, weight=0.5)
        >>> isinstance(wrapped, BoringModel), isinstance(wrapped, OTRTModule), list(wrapped.state_dict())
        (True, True, ['layer.weight', 'layer.bias'])
        >>> wrapped.otrt
        RepresentationTransfer(Linear(...), {'layer': ''}, weight=0.5)
    """

    #: Class attributes of each wrapped class. Not of the instance: its ``__dict__`` is the task's own, and what is
    #: copied or saved with the task must not hold a teacher.
    _task_type: type[pl.LightningModule] | None = None
    _otrt_callback: ModuleCallback

    @takes_options_of(
        RepresentationTransfer, without=("process_group",), description="task: The LightningModule to train."
    )
    def __new__(
        cls,
        task: pl.LightningModule,
        teacher: TeacherSource | RepresentationTransfer,
        layers: LayerSpec = "auto",
        **options: Unpack[TransferOptions],
    ) -> OTRTModule:
        """Wrap a module."""
        _check_task(task)
        check_option_names(cls.__name__, options)
        if _is_copy(task):
            del vars(task)[_CALLBACKS]
        return _wrapped(cls, type(task), ModuleCallback(teacher, layers, options), vars(task))

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Not that of the task: it may need keywords, or register the class."""
        if cls._task_type is None:
            super().__init_subclass__(**keywords)

    @property
    def otrt(self) -> RepresentationTransfer:
        """The transfer that this module trains with."""
        return self._otrt_callback.transfer

    @override
    def configure_callbacks(self) -> list[pl.Callback]:
        """The callbacks of the task, and the one of the transfer."""
        own = super().configure_callbacks()
        return [*(own if isinstance(own, (list, tuple)) else [own]), self._otrt_callback]

    def __deepcopy__(self, memo: dict[int, Any]) -> pl.LightningModule:
        """A plain module of the task's class."""
        plain = object.__new__(_task_type_of(self))
        memo[id(self)] = plain
        # Without the Trainer, which Lightning leaves out, and what else the task leaves out.
        plain.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        vars(plain)[_CALLBACKS] = functools.partial(_callbacks_of_copy, plain)
        return plain

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A plain module of the task's class; the wrapped one on its way to a process that goes on training."""
        if is_being_spawned():
            return _wrapped, (_wrapper_of(self), _task_type_of(self), self._otrt_callback, {}), self.__getstate__()
        return object.__new__, (_task_type_of(self),), self.__getstate__()


def _wrapped(
    wrapper: type[OTRTModule], task_type: type[pl.LightningModule], callback: ModuleCallback, attributes: dict[str, Any]
) -> OTRTModule:
    """An object of a new class, made of the wrapper and the class of the task, with the attributes of the task."""

    def plain(cls: type[OTRTModule], *args: Any, **kwargs: Any) -> pl.LightningModule:
        # Called by `load_from_checkpoint` of a wrapped module, among others.
        return task_type(*args, **kwargs)

    def initialised(self: OTRTModule, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do: the attributes are those of the task."""

    # `load_from_checkpoint` passes the hyperparameters that this signature has.
    initialised.__signature__ = inspect.signature(task_type.__init__)  # type: ignore[attr-defined]
    wrapped_type = type(
        task_type.__name__,
        (wrapper, task_type),
        {
            "__module__": task_type.__module__,
            "__qualname__": task_type.__qualname__,
            "__doc__": task_type.__doc__,
            "__new__": plain,
            "__init__": initialised,
            "_task_type": task_type,
            "_otrt_callback": callback,
        },
    )
    wrapped: OTRTModule = object.__new__(wrapped_type)
    object.__setattr__(wrapped, "__dict__", attributes)
    return wrapped


def _callbacks_of_copy(module: pl.LightningModule) -> Any:
    """``configure_callbacks`` of a deep copy of a wrapped module: a fit of it says that it has no teacher."""
    trainer = module.trainer
    has_transfer = any(isinstance(callback, TransferCallback) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if trainer.state.fn == "fit" and not has_transfer:
        rank_zero_warn(
            f"This {type(module).__name__} is a deep copy of one that OTRTModule wrapped. It is a plain module without "
            "the teacher, and trains without the transfer term. Copy the task before it is wrapped, or wrap the copy."
        )
    return type(module).configure_callbacks(module)


def _is_copy(module: pl.LightningModule) -> bool:
    return getattr(vars(module).get(_CALLBACKS), "func", None) is _callbacks_of_copy


def _task_type_of(wrapped: OTRTModule) -> type[pl.LightningModule]:
    assert wrapped._task_type is not None
    return wrapped._task_type


def _wrapper_of(wrapped: OTRTModule) -> Any:
    return type(wrapped).__bases__[0]


def _check_task(task: Any) -> None:
    if isinstance(task, OTRTModule):
        raise MisconfigurationException(
            "This module is wrapped by OTRTModule already. Attach an OTRTCallback to the Trainer for a second teacher."
        )
    if isinstance(task, pl.LightningModule):
        return
    kind = type(task)
    if any(base.__module__.startswith("pytorch_lightning") for base in kind.__mro__):
        raise TypeError(
            f"Expected `task` to be a LightningModule of the `lightning` package, but {kind.__qualname__} is one of "
            "`pytorch_lightning`. Use one of the two throughout: `import lightning as L`."
        )
    if hasattr(task, "_orig_mod"):
        raise TypeError(
            "Expected `task` to be a LightningModule, but got a compiled one. Wrap it first, then compile the result."
        )
    raise TypeError(
        f"Expected `task` to be a LightningModule, but got {kind.__qualname__}. For a plain module and a loop of your "
        "own there is RepresentationTransfer(teacher, ...).attached(module)."
    )
