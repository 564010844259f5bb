"""Representation transfer as a wrapper around a LightningModule."""

from __future__ import annotations

import copy
from multiprocessing.context import get_spawning_popen
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_otrt.trainer.callback import TransferCallback
from lightning_otrt.transfer import RepresentationTransfer

__all__ = ["OTRTModule"]


class ModuleCallback(TransferCallback):
    """The callback of a wrapped module.

    A class of its own: a callback from ``configure_callbacks`` replaces one of the same class in the Trainer, so that a
    wrapped module and an :class:`OTRTCallback` would not go together.
    """


class OTRTModule:
    """Wraps a LightningModule so that it trains with representation transfer wherever it is trained.

    The result *is* a module of the task's own class, with the task's own parameters, hyperparameters, metrics, hooks
    and checkpoint keys: nothing is nested. It contributes a callback through ``configure_callbacks``. After training,
    ``task`` is the trained, plain module. Deep copies and saved pickles are plain modules of the task's class, without
    the teacher.

    Args:
        task: The LightningModule to train.
        teacher: See :class:`RepresentationTransfer`.
        layers: See :class:`RepresentationTransfer`; names are relative to ``task``.
        **options: The keyword arguments of :class:`OTRTCallback`.

    Returns:
        The wrapped module; ``wrapped.otrt`` is its :class:`RepresentationTransfer`.

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
        >>> isinstance(wrapped, BoringModel), wrapped.layer is task.layer, list(wrapped.state_dict())
        (True, True, ['layer.weight', 'layer.bias'])
    """

    def __new__(cls, task: pl.LightningModule, teacher: Any, layers: Any = "auto", **options: Any) -> Any:
        """Build the wrapped module."""
        _check_task(task)
        callback = ModuleCallback(RepresentationTransfer(teacher, layers, **options))
        wrapped = _wrapped(type(task), callback)
        object.__setattr__(wrapped, "__dict__", task.__dict__)
        return wrapped


class _Wrapped:
    _otrt_callback: ModuleCallback

    @property
    def otrt(self) -> RepresentationTransfer:
        return self._otrt_callback.transfer

    def configure_callbacks(self) -> list[pl.Callback]:
        own = super().configure_callbacks()  # type: ignore[misc]
        return [*(own if isinstance(own, (list, tuple)) else [own]), self._otrt_callback]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        plain = object.__new__(_task_type(self))
        memo[id(self)] = plain
        object.__setattr__(plain, "__dict__", copy.deepcopy(self.__dict__, memo))
        return plain

    def __reduce_ex__(self, protocol: Any) -> Any:
        if get_spawning_popen() is not None:
            # On its way to a process that goes on training (`ddp_spawn`), where a plain module would train without.
            return _wrapped, (_task_type(self), self._otrt_callback), self.__dict__
        return object.__new__, (_task_type(self),), self.__dict__


def _wrapped(task_type: type[pl.LightningModule], callback: ModuleCallback) -> Any:
    # The callback is an attribute of the class, not of the instance, whose __dict__ is the task's own: what is copied
    # or saved with the task must not hold a teacher.
    wrapped_type = type(
        task_type.__name__,
        (_Wrapped, task_type),
        {"__module__": task_type.__module__, "__qualname__": task_type.__qualname__, "_otrt_callback": callback},
    )
    return object.__new__(wrapped_type)


def _task_type(wrapped: _Wrapped) -> type[pl.LightningModule]:
    return type(wrapped).__bases__[1]


def _check_task(task: Any) -> None:
    if isinstance(task, _Wrapped):
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
    raise TypeError(f"Expected `task` to be a LightningModule, but got {kind.__qualname__}.")
