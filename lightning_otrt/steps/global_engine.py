"""The transport term of a batch whose samples lie on several processes, as one process with all of them has it.

A call that solves a plan makes one exchange for all pairs, and its values follow from the same sums; those of an
orthogonal coupling take one more round of vectors. Between solves the values take a few rounds of exchanges; see
:meth:`Cost.shared_value`. Nothing is sent in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_otrt.notices import warn
from lightning_otrt.steps.call import Batch, Call
from lightning_otrt.steps.coupling import MEMORY, Problem
from lightning_otrt.steps.messages import Message, Observed, added, fed, scaled
from lightning_otrt.steps.pair_state import PairState
from lightning_otrt.steps.process_checks import SamePlans, agree
from lightning_otrt.steps.ranks import Ranks
from lightning_otrt.steps.rounds import run_rounds
from lightning_otrt.steps.settings import TermSettings
from lightning_otrt.steps.stacking import Group
from lightning_otrt.steps.term_engine import TermEngine, Values
from lightning_otrt.transport.cost import Rounds, Sums, ValueAndGradient, all_finite
from lightning_otrt.transport.tensors import widest

__all__ = ["GlobalTransportEngine"]


class GlobalTransportEngine(TermEngine):
    """The engine whose batch is that of all processes together.

    Running sums and the scale of the teacher are kept as shares, which add up to the global ones. Every process makes
    the same calls with as many views. Pairs may have other numbers of observations on each process, also none where
    their layers did not run.

    Args:
        names: See :class:`TermEngine`.
        weights: See :class:`TermEngine`.
        settings: See :class:`TermEngine`.
        plans: See :class:`TermEngine`.
        ranks: The processes.

    Raises:
        ValueError: If the cost is not additive over observations, as a user's function need not be.
    """

    is_global = True

    def __init__(
        self,
        names: Sequence[tuple[str, str]],
        weights: Sequence[float],
        settings: TermSettings,
        plans: Sequence[str] = (),
        *,
        ranks: Ranks,
    ) -> None:
        self._ranks: Ranks | None = ranks
        self._is_agreed = False
        #: The pairs with running sums that this process has kept to itself since their last solve.
        self._pending: set[int] = set()
        self._same_plans = SamePlans()
        super().__init__(names, weights, settings, plans)
        self.processes = ranks.size
        if not self.cost.additive:
            raise ValueError(
                f"The cost {self.cost.name!r} is a function of raw neurons, which need not be a sum over samples, so "
                "it has no global batch over processes. Pass global_batch=False for one term per process, or use one "
                "of the named costs."
            )

    @property
    def ranks(self) -> Ranks:
        """The processes.

        Raises:
            RuntimeError: After :meth:`release_ranks`.
        """
        if self._ranks is None:
            raise RuntimeError("The process group of this engine has been released. Attach the transfer again.")
        return self._ranks

    def release_ranks(self) -> None:
        """Let go of the process group, which may be about to end and would keep the engine from being pickled."""
        self._ranks = None

    def reset(self) -> None:
        """Forget plans, statistics and counters."""
        super().reset()
        self._pending.clear()

    def _values(self, call: Call) -> Values:
        """Value and gradient of each pair that has any: exchange, solve, evaluate.

        Raises:
            ValueError: On all processes, if they have other layers or settings, or on the first call, if one of them
                has a value that is not finite or there are too few observations on all of them together.
        """
        if self.calls == 0 or not self._is_agreed:
            self._agree(call)
        if call.is_new:
            problems, observed, is_small = self._exchange(call)
            solved = list(problems)
            alone: dict[Group, PairState] = {(index,): self.states[index] for index in problems}
            self._solve({(index,): problem for index, problem in problems.items()}, alone, is_small)
            if solved:
                self._same_plans.keep(self.ranks, [self.states[index] for index in solved])
            self.calls += 1
        else:
            # Where layers are skipped at random, other pairs may have run than in the call before.
            observed = {index: Observed(views) for index, views in self._count(call).items()}
        return self._evaluate(call.batches, observed)

    def _exchange(self, call: Call) -> tuple[dict[int, Problem], dict[int, Observed], Tensor | None]:
        """Sum over processes once, and feed the statistics.

        Returns:
            The problems of the pairs whose plans are due; what each pair that has a term knows of its value; and
            whether the batch of all is too small for plans that can wait, on the device. None if no plan is due.
        """
        if any(state.reference is None for state in self.states):
            self._choose_references(call.batches)
        local = [self._message(call, index) for index in range(len(call.batches))]
        received = self.ranks.sum([message for message, _, _ in local])
        problems, observed = {}, {}
        samples: Tensor | None = None
        for index, (got, (_, rounds, unsent)) in enumerate(zip(received, local, strict=True)):
            views = self._views(call, index, got.counts)
            if not views:
                continue
            samples = samples if got.samples is None else got.samples
            dtype = call.batches[index][0][0].dtype
            observed[index], problem = self._feed(index, got, unsent, views, dtype)
            observed[index].rounds = [rounds[view] for view in views] if rounds else []
            if problem is not None:
                problems[index] = problem
        return problems, observed, None if samples is None else torch.as_tensor(self._compare_size(samples))

    def _count(self, call: Call) -> dict[int, list[int]]:
        """The views in which each pair ran on some process, where no exchange tells. A collective."""
        local = [batch[0][0].new_tensor(counts) for batch, counts in zip(call.batches, call.counts, strict=True)]
        found = {index: self._views(call, index, total) for index, total in enumerate(self.ranks.sum(local))}
        return {index: views for index, views in found.items() if views}

    def _views(self, call: Call, index: int, total: Tensor) -> list[int]:
        """The views of a pair that make its term, from the observations of each on all processes."""
        counts = call.counts[index]
        # With enough observations of its own a process knows that all have enough together. Others have to read the
        # total, which waits for the device.
        if min(counts) < self.cost.min_observations:
            counts = [int(count) for count in total.tolist()]
        state = self.states[index]
        state.has_run = state.has_run or any(counts)
        return self._usable_views(call, index, counts)

    def _message(self, call: Call, index: int) -> tuple[Message, list[Rounds], Sums]:
        """What a pair sends, its begun rounds, and sums that feed the running ones without being sent."""
        state, coupling, batch = self.states[index], self.couplings[index], call.batches[index]
        y, x = batch[0]
        coupling.prepare(state, y, x, self._places[index], index)
        energy = None
        if self.cost.scaled:
            energy = torch.stack([self.cost.energy(view) for _, view in batch]).sum(0)
            energy = energy if state.energy is None else MEMORY * state.energy + energy
        due = coupling.is_due(state, self.calls)
        sums: list[Sums] = []
        if due or coupling.remembers(state):
            # A pair that never ran anywhere has no reference. Its sums are zeros around any point.
            reference = state.reference or (y.new_zeros(y.shape[0], 1), x.new_zeros(x.shape[0], 1))
            sums = [self.cost.sums(y, x, reference) for y, x in batch]
        unsent = [] if due or not sums else added(sums)
        rounds: list[Rounds] = []
        if state.plan is not None and not due:
            rounds = [coupling.shared_value(state, y, x, energy) for y, x in batch]
        message = Message(
            counts=torch.stack([y.new_full((), view.shape[-1]) for view, _ in batch]),
            energy=energy,
            sums=sums if due else [],
            samples=y.new_full((), call.samples) if due else None,
            running=state.sums if due and state.memory else None,
            not_finite=(~all_finite(unsent)).to(y.dtype) if unsent else None,
            rounds=[next(generator) for generator in rounds],
        )
        return message, rounds, unsent

    def _feed(
        self, index: int, got: Message, unsent: Sums, views: list[int], dtype: torch.dtype
    ) -> tuple[Observed, Problem | None]:
        """Feed the statistics of a pair with the message of all; returns the problem, too, if a plan is due."""
        state, coupling = self.states[index], self.couplings[index]
        energy, size = got.energy, self.ranks.size
        if energy is not None:
            # As in one process: where the first one is not finite, it is that of no batch.
            before = torch.zeros_like(energy) if state.energy is None else state.energy * size
            energy = torch.where(torch.isfinite(energy[0]), energy, before)
            state.energy = energy / size
        if got.not_finite is not None:
            state.sums = fed(state, state.sums, unsent, got.not_finite == 0)
            self._pending.add(index)
        if not got.sums:
            return Observed(views, replies=[got.rounds[view] for view in views] if got.rounds else []), None
        assert state.reference is not None
        observed = Observed(views, sums=[got.sums[view] for view in views], energy=energy, reference=state.reference)
        total = added(got.sums)
        is_finite = all_finite(total)
        if state.memory:
            total = fed(state, got.running, total, is_finite)
            state.sums = [part / size for part in total]
            self._pending.discard(index)
            assert got.samples is not None
            coupling.count(state, got.samples, is_finite)
        else:
            better = self.cost.means(total, state.reference)
            y, x = (torch.where(is_finite, *sides) for sides in zip(better, state.reference, strict=True))
            state.reference = y, x
        return observed, coupling.problem(total, energy, dtype)

    def _evaluate(self, batches: Sequence[Batch], observed: dict[int, Observed]) -> Values:
        """Value and gradient of each pair that has a plan, from sums or by further rounds."""
        values: dict[int, list[ValueAndGradient]] = {}
        waiting: list[int] = []
        rounds: list[Rounds] = []
        replies: list[Sums | None] = []
        for index, known in observed.items():
            batch, state = [batches[index][view] for view in known.views], self.states[index]
            coupling = self.couplings[index]
            if state.plan is None:
                continue
            if known.sums and coupling.has_value_of_sums:
                assert known.reference is not None
                values[index] = [
                    coupling.value_of_sums(state, y, x, sums, known.energy, known.reference)
                    for (y, x), sums in zip(batch, known.sums, strict=True)
                ]
                continue
            waiting.append(index)
            rounds += known.rounds or [coupling.shared_value(state, y, x, state.energy) for y, x in batch]
            replies += known.replies or [None] * len(batch)
        found = iter(run_rounds(rounds, self.ranks.sum, replies))
        values.update({index: [next(found) for _ in observed[index].views] for index in waiting})
        return {
            index: dict(zip(known.views, values[index], strict=True))
            for index, known in observed.items()
            if index in values
        }

    def _agree(self, call: Call) -> None:
        """Compare layers and settings, check the first batch of all, and choose what depends on its size."""
        problem, settings = "", self.settings
        if self.calls == 0:
            try:
                self._inspect(call.batches)
            except ValueError as error:
                problem = str(error)
        mine = {
            "layers": [
                (*names, weight, batch[0][0].shape[0], batch[0][1].shape[0], str(batch[0][0].dtype))
                for names, weight, batch in zip(self.names, self.weights, call.batches, strict=True)
            ],
            "forwards in a call": len(call.batches[0]),
            "calls so far": self.calls,
            "cost": self.cost.name,
            "plan": (
                *dict.fromkeys((settings.plan, *self.plans)),
                settings.epsilon,
                settings.memory,
                settings.solve_every,
                settings.seed,
            ),
        }
        observed = agree(self.ranks, mine, problem, (call.counts, call.samples))
        self._is_agreed = True
        # After a resume with another memory, "auto" has to choose, too.
        if self.calls == 0 or any(state.memory is None for state in self.states):
            self._choose_memories(call, [counts for counts, _ in observed], sum(samples for _, samples in observed))

    def _choose_memories(self, call: Call, counts: Sequence[list[list[int]]], samples: int) -> None:
        """Check the observations of all processes (process, pair, view), and choose what depends on their samples."""
        for index, batch in enumerate(call.batches):
            views = [sum(process[index][view] for process in counts) for view in range(len(batch))]
            self._usable_views(call, index, views)
            neurons = max(side.shape[0] for side in batch[0])
            state = self.states[index]
            if state.memory is None:
                state.memory = self.couplings[index].choose_memory(samples, neurons)

    def _choose_references(self, batches: Sequence[Batch]) -> None:
        """Take the means of a pair's first batch on all processes as the points around which they take their sums."""
        sums = [
            [torch.stack([y.new_full((), y.shape[-1], dtype=widest(y)) for y, _ in batch]).sum()]
            + [torch.stack([pair[side].sum(-1, dtype=widest(pair[side])) for pair in batch]).sum(0) for side in (0, 1)]
            for batch in batches
        ]
        for state, batch, (count, y, x) in zip(self.states, batches, self.ranks.sum(sums), strict=True):
            if state.reference is not None:
                continue  # of an earlier call or from a checkpoint, whose running sums were taken around it
            if not count:
                continue  # no process ran it
            like = batch[0][0]
            # After a resume this batch is not checked. Zero is as good a reference as any.
            y, x = ((side / count).nan_to_num_(0.0, 0.0, 0.0)[:, None].to(like.dtype) for side in (y, x))
            state.reference = y, x

    def synchronize(self) -> None:
        """Share the running sums that each process kept to itself since the last solve. A collective."""
        if not self._pending:
            return
        for state, total in zip(self.states, self.ranks.sum([state.sums for state in self.states]), strict=True):
            state.sums = None if total is None else [part / self.ranks.size for part in total]
        self._pending.clear()

    def state_dict(self) -> dict[str, Any]:
        """The state of the global batch, the same on all processes. Any number of processes can resume from it."""
        if self._pending:
            warn(
                "The running cost is saved with the samples of this process for those of all since the last solve. "
                "Call `synchronize()` on all processes first; Lightning's checkpoints do.",
            )
        return scaled(super().state_dict(), self.processes)

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore :meth:`state_dict`, or that of a single process."""
        super().load_state_dict(scaled(state, 1 / self.processes), device)
        self._pending.clear()
        self._is_agreed, self._same_plans = False, SamePlans()

    def continue_from(self, before: TermEngine, device: torch.device) -> None:
        """Go on where an engine for the same pairs stopped. Shares stay shares where the processes are as many."""
        if not isinstance(before, GlobalTransportEngine) or before.processes != self.processes:
            super().continue_from(before, device)
            return
        super().load_state_dict(super(GlobalTransportEngine, before).state_dict(), device)
        self._pending = set(before._pending)
