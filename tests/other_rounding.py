"""A pytest plugin that rounds like a processor that nobody has: `nox -s "processors(other_rounding)"` loads it.

Sums, products of matrices and exponentials are up to two units in the last place off, in a pattern that depends on the
operation, and on the shapes and strides of its arguments. So the same operations in the same order give the same bits,
and other operations for the same number do not. A test that takes that for granted fails here, on any machine.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations whose kernels choose the order of their sums, or the polynomial of a function.
INEXACT = {
    *("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "mv", "addmv", "addmv_", "dot", "linalg_vecdot"),
    *("convolution", "convolution_backward", "_cdist_forward", "_cdist_backward"),
    *("sum", "mean", "var", "std", "var_mean", "linalg_vector_norm", "logsumexp", "cumsum"),
    *("native_batch_norm", "native_batch_norm_backward", "_native_batch_norm_legit"),
    *("native_layer_norm", "native_layer_norm_backward"),
    *("_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data"),
    *("exp", "exp_", "log", "log_", "tanh", "sigmoid"),
}


def tensors(values: Any) -> Iterator[Tensor]:
    for value in values if isinstance(values, list | tuple) else (values,):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


@functools.lru_cache(4096)
def factors(key: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """One number near 1 for each entry, always the same for a key."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
    steps = torch.randint(-2, 3, shape, generator=generator, dtype=torch.float64)
    return (1 + torch.finfo(dtype).eps * steps).to(dtype)


class OtherRounding(TorchDispatchMode):
    @classmethod
    def is_infra_mode(cls) -> bool:
        """Otherwise nothing would be compiled while it is active."""
        return True

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = operation._schema.name.split("::")
        implicit = "CompositeImplicitAutograd"
        if namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), implicit):
            # In inference mode these arrive whole, and elsewhere as what they consist of.
            with self:
                return operation.decompose(*args, **(kwargs or {}))
        inputs = list(tensors(args)) if name in INEXACT else []
        if not inputs or any(isinstance(tensor, FakeTensor) or tensor.device.type != "cpu" for tensor in inputs):
            return operation(*args, **(kwargs or {}))
        key = name, *((tuple(tensor.shape), tensor.stride()) for tensor in inputs)
        before = inputs[0].clone() if name.startswith(("addm", "baddb")) else None
        output = operation(*args, **(kwargs or {}))
        for index, tensor in enumerate(tensors(output)):
            if tensor.dtype in (torch.float32, torch.float64):
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    # What is exact in any order stays so: counts, and sums to which nothing is added.
                    exact = tensor == tensor.round()
                    if before is not None and before.shape == tensor.shape:
                        exact |= tensor == before
                    tensor.mul_(factors((index, key), tensor.shape, tensor.dtype).where(~exact, 1))
        return output


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    with OtherRounding():
        return (yield)
