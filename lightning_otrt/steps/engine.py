"""Transport of one process over a training run: pairs are observed, solved and evaluated."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

from lightning_otrt.steps.call import Call
from lightning_otrt.steps.coupling import Problem
from lightning_otrt.steps.pair_state import PairState
from lightning_otrt.steps.stacking import Group, Stacks, group_pairs, is_stacked, stacked
from lightning_otrt.steps.step_graphs import Views
from lightning_otrt.steps.term_engine import TermEngine, Values
from lightning_otrt.transport.cost import Evaluate, ValueAndGradient
from lightning_otrt.transport.tensors import joined

__all__ = ["TransportEngine"]


class TransportEngine(TermEngine):
    """The engine of one process. See :class:`~lightning_otrt.steps.term_engine.TermEngine` for its arguments."""

    def reset(self) -> None:
        """Forget plans, statistics and counters."""
        super().reset()
        self._stacks = Stacks()

    def _values(self, call: Call) -> Values:
        """Value and gradient of each pair that has any: observe, solve, evaluate."""
        usable = [self._usable_views(call, index, counts) for index, counts in enumerate(call.counts)]
        if self.calls == 0:
            self._inspect(call.batches)
        for state, counts in zip(self.states, call.counts, strict=True):
            state.has_run = state.has_run or any(counts)
        views = {index: [call.batches[index][view] for view in those] for index, those in enumerate(usable) if those}
        if call.is_new:
            for index, pairs in views.items():
                self.couplings[index].prepare(self.states[index], *pairs[0], self._places[index], index)
        found = self._together(call, views) if is_stacked(call.device) else self._one_by_one(call, views)
        self.calls += call.is_new
        return {index: dict(zip(usable[index], found[index], strict=True)) for index in views if index in found}

    def _one_by_one(self, call: Call, views: Mapping[int, Views]) -> dict[int, list[ValueAndGradient]]:
        """Values and gradients of the pairs, each of them computed by itself."""
        states: dict[Group, PairState] = {(index,): self.states[index] for index in views}
        batches: dict[Group, Views] = {(index,): pairs for index, pairs in views.items()}
        found = self._compute(call.samples, call.is_new, self._due(call, states), batches, states)
        return {index: rows for (index,), rows in found.items()}

    def _together(self, call: Call, views: Mapping[int, Views]) -> dict[int, list[ValueAndGradient]]:
        """The same, with pairs of equal shape as one, and from a graph of the device where calls repeat."""
        groups = group_pairs(views, self.states, self.couplings)
        self._stacks.forget_all_but(groups)
        members = {group: [self.states[index] for index in group] for group in groups}
        batches = {group: stacked([views[index] for index in group]) for group in groups}
        states = {group: self._stacks.join(group, members[group]) for group in groups}
        due = self._due(call, states)
        compute = partial(self._compute, call.samples, call.is_new, due)
        if all(self.couplings[group[0]].can_capture(group in due) for group in groups):
            kind = call.is_new, *(group in due for group in groups)
            together = self.graphs.run(compute, batches, states, kind)
        else:
            together = compute(batches, states)
        found = {}
        for group, state in states.items():
            self._stacks.split(group, state, members[group])
            for number, index in enumerate(group if group in together else ()):
                rows = together[group]
                found[index] = rows if len(group) == 1 else [(value[number], grad[number]) for value, grad in rows]
        return found

    def _due(self, call: Call, states: Mapping[Group, PairState]) -> set[Group]:
        """The groups whose plans are solved in this call."""
        if not call.is_new:
            return set()
        couplings = {group: self.couplings[group[0]] for group in states}
        due = {group for group, state in states.items() if couplings[group].is_due(state, self.calls)}
        if due and self._compare_size(call.samples):
            due = {group for group in due if not couplings[group].can_wait(states[group])}
        return due

    def _compute(
        self,
        samples: int,
        is_new: bool,
        due: Collection[Group],
        batches: dict[Group, Views],
        states: Mapping[Group, PairState],
    ) -> dict[Group, list[ValueAndGradient]]:
        """Bring the states of the groups up to date; values and gradients of those with a plan, for each view.

        Args:
            samples: Number of samples in all views.
            is_new: Whether the batch enters the statistics.
            due: The groups whose plans are solved.
            batches: The neurons of each group. They are taken out.
            states: The state of each group.
        """
        evaluations: dict[Group, Evaluate] = {}
        if is_new:
            problems, evaluations = self._observe(samples, due, batches, states)
            if problems:
                self._solve(problems, states)
        values = {}
        for group, state in states.items():
            views, evaluate = batches.pop(group), evaluations.pop(group, None)
            if state.plan is not None:
                values[group] = [self.couplings[group[0]].value(state, y, x, evaluate) for y, x in views]
            del views, evaluate
        return values

    def _observe(
        self, samples: int, due: Collection[Group], batches: Mapping[Group, Views], states: Mapping[Group, PairState]
    ) -> tuple[dict[Group, Problem], dict[Group, Evaluate]]:
        """Feed the statistics.

        Returns:
            The problems of the groups whose plans are due; and what their values follow from, where that saves work.
        """
        problems, evaluations = {}, {}
        for group, batch in batches.items():
            found = self.couplings[group[0]].observe(states[group], *joined(batch), samples, group in due)
            if found is not None:
                problems[group] = found.problem
                # Of several views the problem is that of all together.
                if found.evaluate is not None and len(batch) == 1:
                    evaluations[group] = found.evaluate
        return problems, evaluations

    def synchronize(self) -> None:
        """Nothing to do for a single process."""

    def release_ranks(self) -> None:
        """Nothing to do for a single process."""
