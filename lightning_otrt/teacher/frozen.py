"""Anything a user has as a teacher -> a network that runs frozen, in evaluation mode, outside the student's state."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_otrt.teacher.load import wrong_form

__all__ = ["Teacher"]

_DTYPES = {
    **dict.fromkeys(("float16", "fp16", "half", "16", "16-true"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16", "bf16-true"), torch.bfloat16),
    **dict.fromkeys(("float32", "fp32", "float", "32", "32-true"), torch.float32),
    **dict.fromkeys(("float64", "fp64", "double", "64", "64-true"), torch.float64),
}
#: Where the `forward` that only raises is defined.
_NO_FORWARD = ("torch.nn.modules.module", "lightning.pytorch.core.module", "pytorch_lightning.core.module")


@dataclass
class _Loan:
    """The module that runs, and how the user's was before."""

    module: nn.Module
    flags: list[tuple[nn.Module, bool]] = field(default_factory=list)
    switched: bool = False
    device: torch.device | None = None
    homes: list[tuple[nn.Module, str, torch.device]] = field(default_factory=list)


class Teacher:
    """A network that runs on the student's inputs, without gradient and in evaluation mode, on loan from the user.

    It is no ``nn.Module``, so that nothing which holds it takes the teacher into its state dict, optimizer or mode. Its
    parameters and buffers keep their values and ``requires_grad``; :meth:`release` gives back devices and modes. A deep
    copy is the teacher itself.

    Args:
        module: The network, with a ``forward``.
        inputs: Adapter (``teacher_inputs``): called with the inputs of the student's root, it returns those of the
            teacher: a tensor, a tuple of positional arguments or a dict of keywords. None passes them on.
        dtype: Type to run in (``teacher_dtype``), such as ``torch.bfloat16`` or ``"bf16-true"``. A module of another
            type runs as a deep copy. None keeps the module's own, or follows :meth:`prepare`.
        role: What errors call it.

    Raises:
        TypeError: If ``module`` is no module or has no ``forward``, or ``inputs`` cannot be called.
        ValueError: If ``dtype`` is unknown.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        >>> teacher = Teacher(net)
        >>> teacher.prepare("cpu")
        >>> teacher(torch.ones(3, 4)).requires_grad, net.training
        (False, False)
        >>> teacher.release()
        >>> net.training
        True
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
        if getattr(module.forward, "__module__", "") in _NO_FORWARD:
            raise TypeError(
                f"The {role} {type(module).__name__} has no `forward` and cannot run. Define one, or pass the network "
                "inside it."
            )
        if inputs is not None and not callable(inputs):
            raise TypeError(f"Expected `teacher_inputs` to be a function of the student's inputs, but got {inputs!r}.")
        self._own = module
        self._inputs = inputs
        self._given = None if dtype is None else _parse_dtype(dtype)
        self._dtype = self._given
        self._loan: _Loan | None = None

    @property
    def module(self) -> nn.Module:
        """The module that runs: the user's own, or a deep copy where the type asked for differs from its own."""
        return self._borrow().module

    def prepare(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Bring the module to a device and into evaluation mode; cheap where it is.

        Belongs before every forward of the student, outside of what is compiled: it does nothing while
        ``torch.compile`` traces.

        Args:
            device: Device of the student.
            dtype: Type of the student's parameters, where a precision plugin changed it; ``dtype`` of the constructor
                goes first. It may replace :attr:`module`, so hooks belong after.
        """
        if torch.compiler.is_compiling():
            return
        wanted = self._given or dtype
        if wanted != self._dtype:
            self.release()
            self._dtype = wanted
        loan = self._borrow()
        _switch_to_evaluation(loan)
        device = torch.device(device)
        # The first tensor tells of a user who moved the module since, without a walk over all of them.
        first = next(chain(loan.module.parameters(), loan.module.buffers()), None)
        if loan.device != device or (first is not None and not _is_on(first, device)):
            _move(loan, device)

    def inputs_for(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The teacher's inputs for those of the student's root: through the adapter, in the teacher's type.

        Raises:
            TypeError: If the adapter returns anything but a tensor, a tuple or a dict.
        """
        inputs = args, dict(kwargs)
        with torch.no_grad():
            if self._inputs is not None:
                inputs = _as_arguments(self._inputs(*args, **kwargs))
            if self._dtype is not None:
                inputs = tree_map_only(Tensor, self._cast, inputs)
        return inputs

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run on inputs that :meth:`inputs_for` gave, under the autocast that is active."""
        loan = self._borrow()
        if not torch.compiler.is_compiling():
            _switch_to_evaluation(loan)
        # Not inference mode: its activations cannot be saved for the backward of the transfer term.
        with torch.no_grad():
            return loan.module(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the inputs of the student's root.

        Raises:
            TypeError: If the adapter returns anything but a tensor, a tuple or a dict.
        """
        return self.run(*self.inputs_for(args, kwargs))

    def release(self) -> None:
        """Give the user's module back on the devices and in the modes it came with; drop a copy."""
        loan, self._loan, self._dtype = self._loan, None, self._given
        if loan is None or loan.module is not self._own:
            return
        # What this teacher did not change is not its to give back: another one may run the same module.
        if loan.switched:
            for module, flag in loan.flags:
                if getattr(module, "training", flag) != flag:
                    module.training = flag
        if loan.homes:
            # Through `to`, which also tells a LightningModule its device; the rest is for homes on several devices.
            loan.module.to(loan.homes[0][2])
            for owner, name, home in loan.homes:
                tensor = owner._parameters.get(name, owner._buffers.get(name))
                if tensor is not None and tensor.device != home:
                    tensor.data = tensor.data.to(home)

    def fingerprint(self) -> str:
        """Type and a checksum of the first values of each parameter: it tells teachers of one architecture apart."""
        checksum = 0
        for parameter in self._own.parameters():
            if not parameter.is_meta and not nn.parameter.is_lazy(parameter):
                values = parameter.detach().flatten()[:16].double().cpu()
                checksum = zlib.crc32(values.numpy().tobytes(), checksum)
        return f"{type(self._own).__name__}-{checksum:08x}"

    def check_against(self, student: nn.Module) -> None:
        """Check that nothing of the teacher is the student's.

        Raises:
            ValueError: If one is or holds the other, they share a parameter or buffer, or the teacher has no values.
        """
        teacher = self._own
        # A task and its wrapper are two objects with one dictionary.
        if teacher is student or vars(teacher) is vars(student):
            raise ValueError(
                "The teacher is the student itself: it would change with it, and the term would stay 0. For a student "
                "that starts as its teacher use copy.deepcopy(student) as the teacher."
            )
        for a, inner, b, outer in (("teacher", teacher, "student", student), ("student", student, "teacher", teacher)):
            name = next((name for name, module in outer.named_modules() if module is inner), None)
            if name is not None:
                raise ValueError(
                    f"The {a} is the submodule {name!r} of the {b}, so that they share weights and mode. Keep the two "
                    "apart, or use copy.deepcopy(teacher) as the teacher."
                )
        taken = {
            key: name
            for name, tensor in chain(student.named_parameters(), student.named_buffers())
            for key in _identities(tensor)
        }
        for name, tensor in chain(teacher.named_parameters(), teacher.named_buffers()):
            if tensor.is_meta or nn.parameter.is_lazy(tensor):
                what = "on the meta device" if tensor.is_meta else "not initialised"
                raise ValueError(f"{name!r} of the teacher is {what}: materialise the teacher first, with its weights.")
            shared = next((taken[key] for key in _identities(tensor) if key in taken), None)
            if shared is not None:
                raise ValueError(
                    f"The teacher shares {name!r} with the student, where it is {shared!r}: training would change "
                    "both. Use copy.deepcopy(teacher) as the teacher."
                )

    def _borrow(self) -> _Loan:
        if self._loan is None:
            self._loan = _Loan(self._own if self._dtype is None else _in_dtype(self._own, self._dtype))
        return self._loan

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """The teacher itself, so that a copy of a task, such as a moving average, does not copy the network."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """All but a copy in another type, which is made anew."""
        own = self._loan is not None and self._loan.module is self._own
        return {**self.__dict__, "_loan": self._loan if own else None}


def _parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(
            f"Expected `teacher_dtype` to be one of {list(_DTYPES)}, or that type of torch, but got {dtype!r}. For "
            "mixed precision leave it out: the teacher runs under the student's autocast."
        )
    return found


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    tensors = chain(module.parameters(), module.buffers())
    if all(tensor.dtype == dtype for tensor in tensors if tensor.is_floating_point()):
        return module
    # The user's own is never cast: from bfloat16 there is no way back.
    return copy.deepcopy(module).to(dtype)


def _switch_to_evaluation(loan: _Loan) -> None:
    if not loan.flags:
        loan.flags = [(module, getattr(module, "training", False)) for module in loan.module.modules()]
    # A frozen script has no flag. Flags are set one by one: `eval` may be overridden, to merge weights for example.
    training = [module for module, _ in loan.flags if getattr(module, "training", False)]
    for module in training:
        module.training = False
    loan.switched = loan.switched or bool(training)


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index or 0)


def _move(loan: _Loan, device: torch.device) -> None:
    tensors = [
        (module, name, tensor)
        for module in loan.module.modules()
        for name, tensor in chain(module._parameters.items(), module._buffers.items())
        if tensor is not None
    ]
    if not all(_is_on(tensor, device) for _, _, tensor in tensors):
        loan.homes = loan.homes or [(module, name, tensor.device) for module, name, tensor in tensors]
        loan.module.to(device)
    loan.device = device


def _as_arguments(adapted: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(adapted, Tensor):
        return (adapted,), {}
    if isinstance(adapted, tuple):
        return adapted, {}
    if isinstance(adapted, Mapping):
        return (), dict(adapted)
    raise TypeError(
        "Expected `teacher_inputs` to return a tensor, a tuple of positional arguments or a dict of keywords, but got "
        f"{type(adapted).__name__}. A list is one argument of the teacher: return it in a tuple, `(images,)`."
    )


def _identities(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors have in common if they are one object or lie in one piece of memory."""
    try:
        memory = tensor.untyped_storage().data_ptr()
    except (RuntimeError, ValueError):  # sparse, lazy or sharded tensors have none to compare
        memory = 0
    return (("object", id(tensor)), ("memory", memory)) if memory else (("object", id(tensor)),)
