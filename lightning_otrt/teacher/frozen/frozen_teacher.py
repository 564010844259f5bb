"""A teacher that runs frozen: in evaluation mode, without gradient, and outside the student's state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_otrt.checks import shown
from lightning_otrt.random_numbers import random_numbers_restored
from lightning_otrt.reading.containers import map_inputs
from lightning_otrt.reading.hooks.recorder import Recorder
from lightning_otrt.reading.pairing import Pairing
from lightning_otrt.reading.torch_internals import unwrapped, without_weight_caches
from lightning_otrt.reading.traced.arguments import renamed
from lightning_otrt.reading.warnings.failed_teacher import inputs_failed
from lightning_otrt.teacher.dtypes import DTYPES, named_dtype
from lightning_otrt.teacher.frozen.borrowed import BorrowedModule, enter_training
from lightning_otrt.teacher.frozen.copied import FollowingCopy, has_dtype
from lightning_otrt.teacher.frozen.identity import checksum_before, stem_checksum, whole_checksum
from lightning_otrt.teacher.frozen.separate import check_separate
from lightning_otrt.teacher.frozen.teacher_call import TeacherCall
from lightning_otrt.teacher.loading.load import wrong_form

__all__ = ["Teacher"]

#: Modules that define the `forward` which only raises. By name, since this floor does not import lightning.
_NO_FORWARD = ("torch.nn.modules.module", "lightning.pytorch.core.module", "pytorch_lightning.core.module")


class Teacher:
    """A user's network that runs on the student's inputs, without gradient and in evaluation mode.

    It is not an ``nn.Module``, so a module that holds it does not take the teacher into its state dict, optimizer or
    modes. Parameters and buffers keep their values and ``requires_grad``. Modes are changed for its own forwards alone:
    other code may run the module in training mode. :meth:`release` restores devices. ``copy.deepcopy`` of a teacher is
    the teacher itself.

    Args:
        module: The network, with a ``forward``.
        inputs: Function (``teacher_inputs``) from the inputs of the student's root to those of the teacher: a tensor, a
            tuple of positional arguments or a dict of keyword arguments. None passes the student's inputs on.
        dtype: Type to run in (``teacher_dtype``), such as ``torch.bfloat16`` or ``"bf16-true"``. A module of another
            type runs as a deep copy, which follows the module's values. None keeps the module's own type, or the one
            given to :meth:`follow`.
        role: What error messages call it.

    Raises:
        TypeError: If ``module`` is not a module or has no ``forward``, or ``inputs`` cannot be called.
        ValueError: If ``dtype`` is unknown.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        >>> teacher = Teacher(net)
        >>> teacher.prepare("cpu")
        >>> teacher(torch.ones(3, 4)).requires_grad, int(net[1].num_batches_tracked), net.training
        (False, 0, True)
        >>> teacher.release()
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        inputs: Callable[..., Any] | None = None,
        dtype: torch.dtype | str | None = None,
        role: str = "teacher",
    ) -> None:
        if not isinstance(module, nn.Module):
            raise wrong_form(module)
        if getattr(unwrapped(module).forward, "__module__", "") in _NO_FORWARD:
            raise TypeError(
                f"The {role} {type(module).__name__} has no `forward` and cannot run. Define one, or pass the network "
                "inside it."
            )
        if inputs is not None and not callable(inputs):
            raise TypeError(
                f"Expected `teacher_inputs` to be a function of the student's inputs, but got {shown(inputs)}."
            )
        self._own = module
        self._inputs = inputs
        self._given_dtype = None if dtype is None else _parse_dtype(dtype)
        self._dtype = self._given_dtype
        self._borrowed: BorrowedModule | None = None
        self._copy: FollowingCopy | None = None
        self._own_dtype = _dtype_of(module)
        #: How it is called on the inputs of the student; another one when the pairs are chosen.
        self.call = TeacherCall()

    @property
    def module(self) -> nn.Module:
        """The module that runs: the user's own, or a deep copy if it runs in another type."""
        return self._borrow().module

    @property
    def source(self) -> nn.Module:
        """The user's own module, whose values the one that runs has; without what compiled it."""
        return unwrapped(self._own)

    def __repr__(self) -> str:
        """The network, and the type that it was told to run in."""
        dtype = "" if self._given_dtype is None else f", dtype={self._given_dtype}"
        return f"{type(self).__name__}({type(self.source).__name__}(...){dtype})"

    @property
    def has_inputs(self) -> bool:
        """Whether the user makes its inputs, which are those of its forward."""
        return self._inputs is not None

    @property
    def run_dtype(self) -> torch.dtype:
        """The type that the module computes in, outside of autocast."""
        return self._dtype or self._own_dtype or torch.float32

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that the module is run in, where one was given; None for its own."""
        return self._dtype

    def follow(self, dtype: torch.dtype | None) -> None:
        """Run in the type that a precision plugin gives the student, unless the constructor was given one.

        Args:
            dtype: That type; None for the module's own. It replaces :attr:`module`, so register hooks after this call.
        """
        if torch.compiler.is_compiling():
            return
        wanted = self._given_dtype or dtype
        if wanted != self._dtype:
            self.release()
            self._dtype = wanted

    def prepare(self, device: torch.device | str) -> None:
        """Move the module to a device. Cheap if nothing has to be done.

        A copy in another type gets the values that the module has now; its :attr:`module` is another one only if the
        structure changed.

        Call it before every forward of the student, outside of compiled code: it does nothing while ``torch.compile``
        traces.

        Args:
            device: Device of the student.
        """
        if torch.compiler.is_compiling():
            return
        borrowed, self._own_dtype = self._borrow(), _dtype_of(self._own)
        if self._copy is not None:
            self._copy.refresh()
            if self._copy.module is not borrowed.module:
                borrowed = self._borrowed = BorrowedModule(self._copy.module)
        borrowed.get_ready()
        borrowed.move_to(device)

    def inputs_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The teacher's inputs for those of the student's root: through ``inputs``, in the teacher's type.

        Raises:
            TypeError: If ``inputs`` returns anything but a tensor, a tuple or a dict.
            RuntimeError: If it fails.
            ValueError: If there is no such function, and the student's hold states of an earlier forward.
        """
        given = args, dict(kwargs)
        with torch.no_grad():
            if self._inputs is not None:
                given = _as_arguments(self._made(self._inputs, args, kwargs))
            else:
                if not torch.compiler.is_compiling():
                    args, kwargs = given = self.call.past_states.without(args, kwargs)
                if self.call.names:
                    given = renamed(args, kwargs, self.call.names)
            dtype = self._dtype or self._own_dtype
            if dtype is not None:
                given = map_inputs(given, functools.partial(_cast, dtype=dtype))
        return given

    @staticmethod
    def _made(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the user's function makes of the student's inputs. Its errors name it and them."""
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            failed = inputs_failed(error, function, (args, kwargs))
            if failed is error:
                raise
            raise failed from error

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run on inputs of :meth:`inputs_for`, under the autocast of the caller."""
        borrowed = self._borrow()
        module, method = self._root_of(borrowed.module), self.call.method
        forward = getattr(module, method) if method else module
        # Training draws what it would draw without the teacher.
        kept = random_numbers_restored(borrowed.module.parameters()) if self.call.draws_random else nullcontext()
        # Not inference mode: the backward of the transfer term could not save tensors made there.
        if not torch.compiler.is_compiling():
            # Its owner may train it in the same step, as where two networks teach each other.
            with borrowed.in_evaluation_mode(), torch.no_grad(), without_weight_caches(), kept:
                return forward(*args, **kwargs)
        switched = borrowed.leave_training()
        with torch.no_grad(), kept:
            found = forward(*args, **kwargs)
        enter_training(switched)
        return found

    def run_recorded(self, recorder: Recorder, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The same, with what its layers give and its masks in the current view of the recorder."""
        method_of = self._root_of(self._borrow().module) if self.call.method else None
        return recorder.run_teacher(self.run, args, kwargs, method_of)

    def _root_of(self, module: nn.Module) -> nn.Module:
        return module.get_submodule(self.call.path) if self.call.path else module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the inputs of the student's root.

        Raises:
            TypeError: If ``inputs`` returns anything but a tensor, a tuple or a dict.
        """
        return self.run(*self.inputs_for(args, kwargs))

    def release(self) -> None:
        """Restore the devices of the user's module, and drop a copy in another type."""
        borrowed, self._borrowed, self._copy, self._dtype = self._borrowed, None, None, self._given_dtype
        if borrowed is not None and borrowed.module is self._own:
            borrowed.give_back()

    def checksum(self) -> str:
        """A text that is known before any forward, see :func:`lightning_otrt.teacher.frozen.identity.stem_checksum`."""
        return stem_checksum(self._own)

    def whole_checksum(self) -> str:
        """A checksum of all parameters, see :mod:`lightning_otrt.teacher.frozen.identity`."""
        return whole_checksum(self._own)

    def checksum_before(self, pairing: Pairing) -> str:
        """A checksum of what leads to the matched layers, see :mod:`lightning_otrt.teacher.frozen.identity`."""
        return checksum_before(self._own, (pair.teacher for pair in pairing.pairs), pairing.teacher)

    def check_against(self, student: nn.Module) -> None:
        """Check that training the student cannot change the teacher.

        Raises:
            ValueError: If they share a module, parameter or buffer, or the teacher has no values.
        """
        check_separate(self._own, student)

    def _borrow(self) -> BorrowedModule:
        if self._borrowed is None:
            if self._dtype is not None and not has_dtype(self._own, self._dtype):
                self._copy = FollowingCopy(self._own, self._dtype)
            self._borrowed = BorrowedModule(self._own if self._copy is None else self._copy.module)
        return self._borrowed

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """The teacher itself, so that a copy of a task, such as a moving average, does not copy the network."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """All but a copy in another type, which is made again when it is needed."""
        is_own = self._borrowed is not None and self._borrowed.module is self._own
        return {**self.__dict__, "_borrowed": self._borrowed if is_own else None, "_copy": None}


def _parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = named_dtype(dtype)
    if found is None:
        raise ValueError(
            f"Expected `teacher_dtype` to be one of {list(DTYPES)}, or that type of torch, but got {shown(dtype)}. "
            "For mixed precision leave it out: the teacher runs under the student's autocast."
        )
    return found


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """The type of a module's first tensor with a fraction: inputs of another type would not go with its weights."""
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, tuple):
        return inputs, {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    raise TypeError(
        "Expected `teacher_inputs` to return a tensor, a tuple of positional arguments or a dict of keywords, but got "
        f"{type(inputs).__name__}. A list is one argument of the teacher: return it in a tuple, `(images,)`."
    )
