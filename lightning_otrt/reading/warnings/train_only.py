"""The warning where the student changes its inputs in training alone, so that the teacher sees other samples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from lightning_otrt.layers.names import named_layers, primary_names
from lightning_otrt.notices import warn
from lightning_otrt.reading.neurons.outputs import describe
from lightning_otrt.reading.torch_internals import (
    add_forward_hook,
    add_forward_pre_hook,
    is_in_functional_transform,
)
from lightning_otrt.reading.traced.arguments import entered_tensor
from lightning_otrt.reading.traced.module_types import role_of

__all__ = ["FirstInput"]

#: Modules whose noise is meant: it is that of the student, and the teacher sees the samples without it.
_NOISE = re.compile(r"drop|stochastic|noise|mask", re.IGNORECASE)
#: Buffers of modules that use the statistics of the batch in training, and running ones in evaluation.
_RUNNING = re.compile(r"running_|num_batches")
#: Largest difference by rounding, relative to the largest value: in types of two bytes, and in others.
_ROUNDING_OF_HALF, _ROUNDING = 2e-2, 1e-3
#: Above this correlation a sample is the same with noise, or with another brightness.
_NEARLY_SAME = 0.97


class FirstInput:
    """Compares what the first layer with weights gets in the traced forward and in the first training forward.

    An augmentation inside the forward, under ``if self.training``, shows there: the traced forward runs in evaluation
    mode. After that comparison no hook is left.

    Example:
        >>> import warnings
        >>> class Flips(nn.Sequential):
        ...     def forward(self, x: Tensor) -> Tensor:
        ...         return super().forward(x.flip(1) if self.training else x)
        >>> net, x, first = Flips(nn.Linear(3, 2)), torch.arange(6.0).reshape(2, 3), FirstInput()
        >>> with first.noted(net, ""):
        ...     _ = net.eval()(x)
        >>> first.compare_next()
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     _ = net.train()(x)
        >>> len(caught)
        1
    """

    def __init__(self) -> None:
        self._root = self._name = ""
        self._module: nn.Module | None = None
        self._value: Tensor | None = None
        self._is_over = False
        #: Whether the last comparison showed a change.
        self.has_warned = False
        self._handle: RemovableHandle | None = None

    @contextmanager
    def noted(self, student: nn.Module, root: str) -> Iterator[None]:
        """Note the input in the first forward inside the block.

        Args:
            student: The student.
            root: Name of the module that runs.
        """
        self.forget()
        self._root, self._is_over, self.has_warned = root, False, False
        modules = named_layers(student)
        names = primary_names(modules, root)
        with ExitStack() as hooks:
            for module in modules[root].modules():
                name = names.get(id(module))
                if name is not None:
                    before = partial(self._before, name)
                    hooks.callback(add_forward_pre_hook(module, before, with_kwargs=True).remove)
                    hooks.callback(add_forward_hook(module, self._after).remove)
            yield

    def compare_next(self) -> None:
        """Compare with what the same layer gets when it runs next, and warn where it is something else."""
        if self._module is not None and self._value is not None:
            self._handle = add_forward_pre_hook(self._module, self._compare, with_kwargs=True)

    def forget(self) -> None:
        """Remove what is left of hooks, and the values."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._module = self._value = None

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_over:
            return
        is_noise = role_of(module) == "dropout" or _NOISE.search(type(module).__name__) is not None
        if _is_first_layer(module):
            self._is_over, self._name, self._module = True, name, module
            value = _comparable(entered_tensor(args, kwargs))
            self._value = None if value is None else value.detach().clone()
        elif is_noise or any(_RUNNING.search(buffer) for buffer, _ in module.named_buffers(recurse=False)):
            self._is_over = True

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # It used its weights without calling a layer that has some: what comes behind it may have noise.
        self._is_over = self._is_over or next(module.parameters(), None) is not None

    def _compare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        before, now = self._value, _comparable(entered_tensor(args, kwargs))
        self.forget()
        if before is None or now is None or _is_same(before, now.detach()):
            return
        self.has_warned = True
        what = "other values" if now.shape == before.shape else describe(now)
        whose = f"{self._root!r} of the student" if self._root else "the student"
        warn(
            f"The forward of {whose} changes its inputs in training: its first layer with weights, {self._name!r} "
            f"({type(module).__name__}), got {describe(before)} in evaluation mode and {what} in training mode, on one "
            f"batch. The teacher gets what enters {whose}, so an augmentation inside of the forward, such as a flip, a "
            "crop, a mixture or a random size, does not reach it: the two networks see different samples. Augment the "
            "batch before the network, or name the module behind the augmentation as `student_root`. If the forward "
            "only adds noise to the same samples, nothing is wrong.",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstInput:
        """The same object: a copy that is made during the first step is not watched."""
        return self


def _is_first_layer(module: nn.Module) -> bool:
    """Whether a module uses weights of its own, and calls no other module before that."""
    if next(module.parameters(), None) is None:
        return False
    is_alone = next(module.children(), None) is None or parametrize.is_parametrized(module)
    return is_alone or isinstance(module, nn.MultiheadAttention)


def _comparable(value: Tensor | None) -> Tensor | None:
    """The tensor that entered; None where its values cannot be compared."""
    if (
        value is None
        or is_in_functional_transform()
        or value.is_nested
        or value.layout != torch.strided
        or hasattr(value, "device_mesh")
    ):
        return None
    return value


def _is_same(before: Tensor, now: Tensor) -> bool:
    """Whether two inputs are equal but for rounding, a common factor, values that were dropped, and small noise."""
    if before.shape != now.shape:
        return False
    if not before.is_floating_point() or not now.is_floating_point() or not before.numel():
        return torch.equal(before, now)
    is_half = before.element_size() < 4
    x, y = before.float().flatten(), now.float().flatten()
    if not bool(x.isfinite().all() & y.isfinite().all()):
        return True  # reported where it reaches a layer
    rounding = (_ROUNDING_OF_HALF if is_half else _ROUNDING) * float(x.abs().max())
    if float((x - y).abs().max()) <= rounding:
        return True
    kept = y.abs() > rounding  # dropout sets the others to zero
    factor = float((x[kept] * y[kept]).sum() / (x[kept] ** 2).sum())
    if bool(((factor * x - y)[kept].abs() <= rounding * max(factor, 1.0)).all()):
        return True
    return before.dim() > 1 and _least_correlation(before.float().flatten(1), now.float().flatten(1)) > _NEARLY_SAME


def _least_correlation(x: Tensor, y: Tensor) -> float:
    """The smallest of the correlations of rows."""
    x, y = (rows - rows.mean(1, keepdim=True) for rows in (x, y))
    return float(functional.cosine_similarity(x, y, dim=1).min())
