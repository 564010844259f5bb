"""Counts what a function does: operations on tensors, products of matrices, reads of values, bytes that it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations that read values. On a device they wait for it.
READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2", "equal"}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}


class Operations(TorchDispatchMode):
    """Counts operations, and products of two matrices apart from those with a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        self.counts[name] += 1
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        self.products += name in PRODUCTS and min(tensors[-1].shape[-2:]) > 3
        return func(*args, **(kwargs or {}))

    def reads(self) -> int:
        return sum(self.counts[name] for name in READS)


def operations(function: Callable[[], object]) -> Operations:
    with Operations() as found:
        function()
    return found


def peak_floats(function: Callable[[], object]) -> float:
    """Most float32 numbers that a function holds beyond those there were, by the profiler's record of allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    sizes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(sizes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert most > 0
    return most / 4
