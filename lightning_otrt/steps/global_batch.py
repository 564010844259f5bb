"""The transport term of a batch whose samples lie on several processes: that of one process that has them all.

A call that solves a plan makes one flat all-reduce for all pairs; its values follow from the same sums. Between
solves a call makes the rounds of :meth:`Cost.shared_value`. Nothing is communicated in the backward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_otrt.steps.engine import MEMORY, PairDistance, TransportEngine
from lightning_otrt.steps.pair_state import PairState
from lightning_otrt.steps.ranks import Ranks
from lightning_otrt.transport.cost import Plan, Rounds, Sums, ValueAndGradient, all_finite, decay_and_add
from lightning_otrt.transport.custom_cost import CustomCost
from lightning_otrt.transport.distance import run_rounds
from lightning_otrt.transport.tensors import common_dtype

__all__ = ["GlobalTransportEngine"]

Batch = Sequence[tuple[Tensor, Tensor]]


@dataclass
class _Known:
    """What the exchange of a call already told of the value of one pair: global sums, or replies to first rounds."""

    sums: list[Sums] = field(default_factory=list)
    energy: Tensor = field(default_factory=lambda: torch.empty(0))
    reference: tuple[Tensor, Tensor] | None = None
    rounds: list[Rounds] = field(default_factory=list)
    replies: list[Sums] = field(default_factory=list)


@dataclass
class GlobalTransportEngine(TransportEngine):
    """A :class:`TransportEngine` that takes the batches of all processes for one.

    The running sums and the scale of the teacher are kept as shares: those of all processes add up to the global ones.
    Every process makes the same calls, with as many views; a pair may have any number of observations, other than none.

    Args:
        ranks: The processes.
    """

    ranks: Ranks | None = None
    _is_agreed: bool = False
    _is_compared: bool = False
    _sends_plans: bool = False
    _is_pending: bool = False
    _active: list[int] = field(default_factory=list)
    _known: dict[int, _Known] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a cost that is no sum over observations.

        Raises:
            ValueError: If the cost is a user's function.
        """
        if isinstance(self.cost, CustomCost):
            raise ValueError(
                f"The cost {self.cost.function!r} is a function of raw neurons, which need not be a sum over samples, "
                "so it has no global batch over processes. Pass global_batch=False for one term per process, or use "
                "one of the named costs."
            )
        super().__post_init__()
        self.processes = self._others.size

    @property
    def _others(self) -> Ranks:
        assert self.ranks is not None
        return self.ranks

    def reset(self) -> None:
        """Forget plans, statistics and counters."""
        super().reset()
        self._is_pending = False

    def __call__(
        self, views: Sequence[Sequence[tuple[Tensor, Tensor]]], samples: int, *, reevaluation: bool = False
    ) -> tuple[Tensor, list[PairDistance]]:
        """The term of one call; its value is the same on all processes. See :class:`TransportEngine`.

        Raises:
            ValueError: On all processes, if they have other layers or settings, or on the first call, if one of them
                has a value that is not finite or there are too few observations on all of them together.
        """
        with torch.no_grad(), torch.autocast(views[0][0][0].device.type, enabled=False):
            batches = [[common_dtype(y.detach(), x.detach()) for y, x in pair] for pair in zip(*views, strict=True)]
            if self.calls == 0 or not self._is_agreed:
                self._agree(batches, samples)
            if not reevaluation or self.calls == 0:
                self._active = self._exchange(batches, samples)
                self.calls += 1
            try:
                return self._evaluate(views, batches, self._active)
            finally:
                self._known.clear()

    def _exchange(self, batches: Sequence[Batch], samples: int) -> list[int]:
        """The one flat sum of a call: statistics are fed and plans solved; returns the pairs that have a term."""
        sent = [self._local(index, batch, samples) for index, batch in enumerate(batches)]
        leaves, structure = tree_flatten([message for message, _ in sent])
        received = tree_unflatten(self._others.sum(leaves), structure)
        active, matrices = [], {}
        for index, (batch, got) in enumerate(zip(batches, received, strict=True)):
            # Who has enough knows that all have; who has not asks, and then all who could be too few do.
            count = min(y.shape[-1] for y, _ in batch)
            if count < self.cost.min_observations:
                count = int(got["counts"].min())
            if self._has_enough(index, count):
                active.append(index)
                matrix = self._feed(index, got, sent[index][1], batch[0][0])
                if matrix is not None:
                    matrices[index] = matrix
        if matrices:
            solved = list(matrices)
            self._solve(matrices)
            self._compare_plans(solved)
        return active

    def _local(self, index: int, batch: Batch, samples: int) -> tuple[dict[str, Any], Sums]:
        """What a pair sends, and the new part of its running sums where that stays here until the next solve."""
        state = self.pairs[index]
        y, x = batch[0]
        self._fix(index, y, x)
        message: dict[str, Any] = {"counts": torch.stack([y.new_full((), view.shape[-1]) for view, _ in batch])}
        energy, new = torch.empty(0), Sums()
        if self.cost.scaled:
            energy = torch.stack([self.cost.energy(view) for _, view in batch]).sum(0)
            energy = energy if state.energy is None else MEMORY * state.energy + energy
            message["energy"] = energy
        solves = self.plan not in ("identity", "uniform", "random")
        due = solves and self._is_due(state)
        if due or (solves and state.memory and self.plan != "static"):
            sums = [self.cost.sums(y, x, state.reference) for y, x in batch]
            if due:
                message["sums"] = sums
                message["samples"] = y.new_full((), samples)
                if state.memory and state.sums is not None:
                    message["running"] = state.sums
            else:
                new = _add(sums)
                message["unfit"] = (~all_finite(new)).to(y.dtype)
        if state.plan is not None and not due:
            rounds = [self.cost.shared_value(y, x, state.plan, energy) for y, x in batch]
            self._known[index] = _Known(rounds=rounds)
            message["rounds"] = [next(generator) for generator in rounds]
        return message, new

    def _feed(self, index: int, got: dict[str, Any], new: Sums, like: Tensor) -> Tensor | None:
        """Feed the statistics of a pair with the sums of all processes; returns the cost matrix where one is due."""
        state, size = self.pairs[index], self._others.size
        energy = like.new_ones(2)
        if "energy" in got:
            energy = got["energy"]
            if state.energy is not None:
                energy = torch.where(torch.isfinite(energy[0]), energy, state.energy * size)
            state.energy = energy / size
        if "rounds" in got:
            self._known[index].replies = got["rounds"]
        if "unfit" in got:
            state.sums, self._is_pending = _fed(state, state.sums, new, got["unfit"] == 0), True
        if "sums" not in got:
            return None
        assert state.reference is not None
        self._known[index] = _Known(sums=got["sums"], energy=energy, reference=state.reference)
        total = _add(got["sums"])
        fits = all_finite(total)
        if state.memory:
            total = _fed(state, got.get("running"), total, fits)
            state.sums, self._is_pending = [part / size for part in total], False
            if self.plan == "static" and bool(fits):
                state.samples += int(got["samples"])
        else:
            better = self.cost.means(total, state.reference)
            y, x = (torch.where(fits, *sides) for sides in zip(better, state.reference, strict=True))
            state.reference = y, x
        return self.cost.matrix(total, energy).to(like.dtype)

    def _values(
        self, keys: Sequence[tuple[int, int]], batches: Sequence[Batch], plans: dict[int, Plan]
    ) -> list[ValueAndGradient]:
        results: dict[tuple[int, int], ValueAndGradient] = {}
        rounds: dict[tuple[int, int], Rounds] = {}
        replies: list[Sums | None] = []
        for index, view in keys:
            y, x = batches[index][view]
            known = self._known.get(index, _Known())
            if known.sums:
                assert known.reference is not None
                results[index, view] = self.cost.value_of_sums(
                    y, x, plans[index], known.sums[view], known.energy, known.reference
                )
            else:
                begun = bool(known.rounds)
                rounds[index, view] = (
                    known.rounds[view] if begun else self.cost.shared_value(y, x, plans[index], self._energy(index))
                )
                replies.append(known.replies[view] if begun else None)
        found = run_rounds(list(rounds.values()), self._others.sum, replies)
        results.update(zip(rounds, found, strict=True))
        return [results[key] for key in keys]

    def _agree(self, batches: Sequence[Batch], samples: int) -> None:
        """Compare layers and settings, check the first batch of all, and choose what depends on its size."""
        problems = []
        if self.calls == 0:
            try:
                self._check_first(batches)
            except ValueError as error:
                problems.append(str(error))
        mine = {
            "layers": [
                (*names, weight, batch[0][0].shape[0], batch[0][1].shape[0], str(batch[0][0].dtype))
                for names, weight, batch in zip(self.names, self.weights, batches, strict=True)
            ],
            "forwards in a call": len(batches[0]),
            "calls so far": self.calls,
            "cost": self.cost.name,
            "plan": (self.plan, self.epsilon, self.memory, self.solve_every, self.seed),
        }
        counts = [[y.shape[-1] for y, _ in batch] for batch in batches]
        gathered = self._others.gather((mine, problems, (counts, samples)))
        for rank, (theirs, _, _) in enumerate(gathered):
            for what, value in gathered[0][0].items():
                if theirs[what] != value:
                    raise ValueError(
                        f"The processes of the global batch disagree on the {what} of the transfer term: process 0 has "
                        f"{value}, but process {rank} has {theirs[what]}. Build model, teacher and options alike on "
                        "all of them, or pass global_batch=False."
                    )
        for rank, (_, theirs, _) in enumerate(gathered):
            if theirs:
                raise ValueError(f"Process {rank} of {self._others.size}: {theirs[0]}")
        self._is_agreed = True
        # Of a state with another memory, too, "auto" has to choose.
        if self.calls == 0 or any(state.memory is None for state in self.pairs):
            self._size_up(batches, *zip(*(sizes for _, _, sizes in gathered), strict=True))
        if any(state.reference is None for state in self.pairs):
            self._choose_references(batches)

    def _size_up(
        self, batches: Sequence[Batch], counts: Sequence[Sequence[Sequence[int]]], samples: Sequence[int]
    ) -> None:
        """Choose what depends on the observations (process, pair, view) and on the samples of all processes."""
        for index, batch in enumerate(batches):
            views = [sum(other[index][view] for other in counts) for view in range(len(batch))]
            self._has_enough(index, min(views))
            if self.plan not in ("identity", "uniform", "random"):
                self.pairs[index].memory = self._memory(sum(samples), max(side.shape[0] for side in batch[0]))

    def _choose_references(self, batches: Sequence[Batch]) -> None:
        """The means of the first batch of all, around which all processes take their sums."""
        message = [
            [torch.stack([y.new_full((), y.shape[-1], dtype=torch.float64) for y, _ in batch]).sum()]
            + [torch.stack([pair[side].sum(-1, dtype=torch.float64) for pair in batch]).sum(0) for side in (0, 1)]
            for batch in batches
        ]
        leaves, structure = tree_flatten(message)
        for state, batch, (count, y, x) in zip(
            self.pairs, batches, tree_unflatten(self._others.sum(leaves), structure), strict=True
        ):
            if state.reference is not None:
                continue  # from a checkpoint, with running sums around it
            like = batch[0][0]
            # After a resume nothing has checked this batch; 0 is a reference, too.
            y, x = ((side / count).nan_to_num_(0.0, 0.0, 0.0)[:, None].to(like.dtype) for side in (y, x))
            state.reference = y, x

    def _compare_plans(self, solved: Sequence[int]) -> None:
        """All solve the same problem; where arithmetic differs between machines, all take the first one's plans."""
        states = [self.pairs[index] for index in solved]
        tensors = [state.plan.matrix for state in states if state.plan is not None]
        tensors += [state.potential for state in states if state.potential is not None]
        if not self._is_compared:
            self._is_compared = True
            self._sends_plans = not self._others.have_same(tensors)
            if self._sends_plans:
                warnings.warn(
                    "The transport plans that the processes solved from the same sums differ in some bits, as on "
                    "unlike devices: from now on all take those of process 0, one broadcast for each solve.",
                    stacklevel=2,
                )
        if self._sends_plans:
            received = iter(self._others.broadcast(tensors))
            for state in states:
                state.plan = Plan.of(next(received))
            for state in states:
                state.potential = None if state.potential is None else next(received)

    def synchronize(self) -> None:
        """Share the running sums that processes keep to themselves between solves; a collective."""
        if not self._is_pending:
            return
        remembered = [state for state in self.pairs if state.sums is not None]
        leaves, structure = tree_flatten([state.sums for state in remembered])
        for state, sums in zip(remembered, tree_unflatten(self._others.sum(leaves), structure), strict=True):
            state.sums = [part / self._others.size for part in sums]
        self._is_pending = False

    def state_dict(self) -> dict[str, Any]:
        """The state of the global batch, which any number of processes can resume; the same on all of them."""
        if self._is_pending:
            warnings.warn(
                "The running cost is saved with the samples of this process for those of all since the last solve. "
                "Call `synchronize()` on all processes first; Lightning's checkpoints do.",
                stacklevel=3,
            )
        return _scaled(super().state_dict(), self.processes)

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore :meth:`state_dict`, or that of a single process."""
        super().load_state_dict(_scaled(state, 1 / self.processes), device)
        self._is_pending = self._is_agreed = self._is_compared = False


def _fed(state: PairState, running: Sums | None, new: Sums, fits: Tensor) -> Sums:
    """The running sums with new ones, or those alone where there are none; what is not finite adds nothing."""
    assert state.memory is not None
    return decay_and_add(
        [torch.zeros_like(part) for part in new] if running is None else running, state.memory, new, fits
    )


def _add(sums: Sequence[Sums]) -> Sums:
    """The sums of several views as one."""
    return [torch.stack(parts).sum(0) if len(parts) > 1 else parts[0] for parts in zip(*sums, strict=True)]


def _scaled(state: dict[str, Any], factor: float) -> dict[str, Any]:
    """The state of an engine with its additive statistics times ``factor``."""

    def scale(pair: dict[str, Any]) -> dict[str, Any]:
        sums, energy = pair["sums"], pair["energy"]
        return {
            **pair,
            "sums": None if sums is None else [part * factor for part in sums],
            "energy": None if energy is None else energy * factor,
        }

    return {**state, "pairs": [scale(pair) for pair in state["pairs"]]}
