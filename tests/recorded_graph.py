"""Stands for a CUDA graph on a CPU: the operations of a capture, which are done again on the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_otrt.steps import step_graphs

__all__ = ["RecordedGraph", "use_recorded_graphs"]

#: Operations that a capture refuses, since they wait.
READS = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero"}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        written = [
            given
            for part, given in zip(func._schema.arguments, [*args, *kwargs.values()], strict=False)
            if part.alias_info is not None and part.alias_info.is_write
        ]
        written += [kwargs["out"]] if isinstance(kwargs.get("out"), Tensor) else []
        for tensor in written:
            self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        found = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, tree_leaves(found)))
        return found


class RecordedGraph:
    """A capture runs nothing: what it wrote to is as before. The results of a replay lie where the capture put them."""

    def __init__(self) -> None:
        self.replays = 0

    @contextmanager
    def capturing(self, pool: Any) -> Iterator[None]:
        recorder = _Recorder()
        with recorder:
            yield
        for tensor, before in reversed(recorder.before.values()):
            tensor.copy_(before)
        self.calls = recorder.calls

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, places in self.calls:
            for new, place in zip(tree_leaves(func(*args, **kwargs)), places, strict=True):
                if isinstance(place, Tensor) and new.data_ptr() != place.data_ptr():
                    place.copy_(new)


@pytest.fixture
def use_recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """Calls on a CPU take the path of a device, and are captured; returns the graphs that are made."""
    for module in ("transport.correlation", "transport.moments", "transport.tensors", "steps.pair_state"):
        monkeypatch.setattr(f"lightning_otrt.{module}.all_nonzero", lambda values: False)
    monkeypatch.setattr("lightning_otrt.steps.engine.is_stacked", lambda device: True)
    monkeypatch.setattr(step_graphs, "can_capture", lambda tensor: True)
    monkeypatch.setattr(step_graphs, "graph_pool", lambda: None)
    made: list[RecordedGraph] = []

    def make() -> RecordedGraph:
        made.append(RecordedGraph())
        return made[-1]

    monkeypatch.setattr(step_graphs, "CudaGraph", make)
    return made
