"""Calls of the engine as CUDA graphs: one launch in place of some hundred.

On a GPU the time of a call is that of its launches, which the host makes one by one. A call whose shapes and states are
those of earlier calls is captured. From then on its neurons are copied into the buffers of the graph, the graph is
replayed, and what it found is copied out. The kernels are the same, so that the numbers are, too.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_otrt.notices import warn
from lightning_otrt.steps.pair_state import PairState
from lightning_otrt.steps.stacking import Group
from lightning_otrt.transport.cost import ValueAndGradient

__all__ = ["Compute", "StepGraphs", "Views"]

#: Calls of a kind before one is captured: the libraries of the device set themselves up in these.
CALLS_BEFORE = 2
#: Most captures of a run. One holds the memory of a call, and where shapes never settle, none is worth its time.
MOST_CAPTURES = 8
#: Captures of a kind after which it is left alone: its sums become other tensors again and again.
MOST_LOSSES = 2
#: Kinds of calls that are counted. Beyond these the count begins anew: their shapes do not settle.
MOST_KINDS = 4096

#: Neurons of student and teacher, for each view.
Views: TypeAlias = list[tuple[Tensor, Tensor]]
_Values: TypeAlias = dict[Group, list[ValueAndGradient]]
#: Values and gradients of groups of pairs, from their neurons and states, which it brings up to date.
Compute: TypeAlias = Callable[[dict[Group, Views], Mapping[Group, PairState]], _Values]


class CudaGraph:
    """What is captured once and then replayed."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    @contextmanager
    def capturing(self, pool: Any) -> Iterator[None]:
        """Capture what runs in the block on the current device, without running it."""
        before = torch.cuda.current_stream()
        # A stream of its own: torch's default for captures may belong to another device.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        try:
            with warnings.catch_warnings():
                # An empty graph would give the results of this call for ever.
                warnings.filterwarnings("error", message=".*CUDA Graph is empty")
                # Other threads, as those that pin memory for a data loader, go on calling CUDA.
                with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    yield
        finally:
            # Where a capture fails, torch leaves its stream in use.
            torch.cuda.set_stream(before)

    def replay(self) -> None:
        """Run it on what its tensors hold now."""
        self._graph.replay()


def can_capture(tensor: Tensor) -> bool:
    """Whether operations on this tensor can be captured here: not in a capture of the user, nor where it is fake."""
    return (
        type(tensor) is Tensor
        and tensor.is_cuda
        and tensor.device.index == torch.cuda.current_device()
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
        # Other allocators do not keep the memory of a graph for it.
        and torch.cuda.get_allocator_backend() in ("native", "cudaMallocAsync")
        and not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")
    )


def graph_pool() -> Any:
    """Memory that the graphs of a run share: they never run at the same time."""
    return torch.cuda.graph_pool_handle()


class StepGraphs:
    """The captured calls of a run.

    Attributes:
        is_enabled: Whether calls are captured.
    """

    def __init__(self) -> None:
        self.is_enabled = True
        self.forget()

    def forget(self) -> None:
        """Let go of all graphs and of their memory."""
        # By the hash of a kind: a kind with many pairs takes tens of kilobytes, and thousands of them are counted.
        self._seen: Counter[int] = Counter()
        self._lost: Counter[int] = Counter()
        self._captured: dict[Hashable, _Captured] = {}
        self._captures = 0
        self._pool: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Graphs belong to one process and one run: a copy makes its own."""
        return {"is_enabled": self.is_enabled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.is_enabled = state["is_enabled"]

    def run(
        self,
        compute: Compute,
        views: dict[Group, Views],
        states: Mapping[Group, PairState],
        kind: Hashable,
    ) -> _Values:
        """What ``compute`` gives: from a graph, where one fits or is worth a capture.

        Args:
            compute: Operations on the device alone. Nothing in it waits, and no shape depends on a value. Sums may be
                changed in place; nothing else is.
            views: Neurons of each group, for each view. They are taken out.
            states: The state of each group.
            kind: All else that the operations depend on.
        """
        first = next(iter(views.values()), None)
        if not self.is_enabled or first is None or not can_capture(first[0][0]):
            return compute(views, states)
        key = kind, *((group, *_kind(views[group], state)) for group, state in states.items())
        captured = self._captured.get(key)
        if captured is not None and not captured.is_bound_to(states):
            # The sums are other tensors, as after a checkpoint was loaded.
            del self._captured[key]
            self._lost[hash(key)] += 1
            self._seen[hash(key)] = 0
            captured = None
        if captured is None:
            captured = self._capture(compute, views, states, key)
        return compute(views, states) if captured is None else captured.replay(views, states)

    def _capture(
        self, compute: Compute, views: Mapping[Group, Views], states: Mapping[Group, PairState], key: Hashable
    ) -> _Captured | None:
        """The capture of a call; None if that is too early, or failed."""
        kind = hash(key)
        has_plans = all(state.plan is not None for state in states.values())
        if self._captures >= MOST_CAPTURES or self._lost[kind] >= MOST_LOSSES or not has_plans:
            return None
        if self._seen[kind] < CALLS_BEFORE:
            if len(self._seen) >= MOST_KINDS:
                self._seen.clear()
            self._seen[kind] += 1
            return None
        self._captures += 1
        if not self._captured:
            self._pool = graph_pool()  # a pool ends with its last graph
        try:
            self._captured[key] = _Captured(compute, views, states, self._pool)
        except _NotInPlaceError:
            self._lost[kind] = MOST_LOSSES
            return None
        except (RuntimeError, UserWarning) as error:
            self.is_enabled = False
            self.forget()
            warn(
                f"A call of the transport term could not be captured in a CUDA graph: {error} It runs without one, "
                "with the same values, but slower. `transfer.cuda_graphs = False` before training avoids the attempt.",
            )
            return None
        return self._captured[key]


class _NotInPlaceError(Exception):
    """A call leaves its sums in other tensors, which a graph cannot follow."""


class _Captured:
    """One call: its graph, and the tensors that the graph reads and writes.

    Plans, potentials and scales are copied in when they are new, and out where the call changes them. So what users
    hold of an earlier call stays as it was. The sums, which no user sees, are changed in place.
    """

    def __init__(
        self, compute: Compute, views: Mapping[Group, Views], states: Mapping[Group, PairState], pool: Any
    ) -> None:
        self._views = {group: [(y.clone(), x.clone()) for y, x in pairs] for group, pairs in views.items()}
        self._bound = {group: _bound(state) for group, state in states.items()}
        self._inputs = {group: [part.clone() for part in _copied(state)] for group, state in states.items()}
        #: What each input was last copied from.
        self._sources = {group: _copied(state) for group, state in states.items()}
        shadows = {group: _give(PairState(), self._inputs[group], state) for group, state in states.items()}
        self._graph = CudaGraph()
        with self._graph.capturing(pool):
            self._values = compute(dict(self._views), shadows)
        if not self.is_bound_to(shadows) or any(shadows[group].layout() != states[group].layout() for group in states):
            raise _NotInPlaceError
        self._outputs = {group: _copied(shadow) for group, shadow in shadows.items()}

    def is_bound_to(self, states: Mapping[Group, PairState]) -> bool:
        """Whether the sums of the states are the tensors that the graph changes."""
        return all(
            len(bound) == len(now := _bound(states[group])) and all(map(_is, bound, now))
            for group, bound in self._bound.items()
        )

    def replay(self, views: Mapping[Group, Views], states: Mapping[Group, PairState]) -> _Values:
        """The call with these neurons and states."""
        for group, pairs in views.items():
            for mine, given in zip(self._views[group], pairs, strict=True):
                for target, source in zip(mine, given, strict=True):
                    target.copy_(source)
            sources = _copied(states[group])
            for target, known, source in zip(self._inputs[group], self._sources[group], sources, strict=True):
                if source is not known:
                    target.copy_(source)
            self._sources[group] = sources
        self._graph.replay()
        for group, state in states.items():
            inputs, outputs = self._inputs[group], self._outputs[group]
            if not all(map(_is, inputs, outputs)):
                kept = zip(_copied(state), inputs, outputs, strict=True)
                _give(state, [old if output is target else output.clone() for old, target, output in kept])
        # Copies: a later call may come before the backward pass of this one.
        return {
            group: [(value.clone(), gradient.clone()) for value, gradient in values]
            for group, values in self._values.items()
        }


def _kind(views: Views, state: PairState) -> tuple[Hashable, ...]:
    """What a graph is made for."""
    tensors = [*(side for pair in views for side in pair), *state.tensors()]
    shapes = tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors)
    return state.memory, state.layout(), shapes


def _bound(state: PairState) -> list[Tensor]:
    """The tensors that a graph uses where they are."""
    return [*(state.sums or ()), *(state.reference or ())]


def _copied(state: PairState) -> list[Tensor]:
    """The tensors that are copied into a graph, and out of it."""
    return [*(state.plan or ()), *(part for part in (state.potential, state.energy) if part is not None)]


def _give(state: PairState, copied: Sequence[Tensor], like: PairState | None = None) -> PairState:
    """Give a state these tensors in place of what :func:`_copied` gives, and the others of ``like``."""
    like = like or state
    parts = len(like.plan or ())
    state.take(like, [*copied[:parts], *_bound(like), *copied[parts:]])
    return state


def _is(one: object, other: object) -> bool:
    return one is other
