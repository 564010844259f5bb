"""Transport of one process over a training run: pairs of equal shape are observed, solved and evaluated together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from lightning_otrt.steps.coupling import Problem
from lightning_otrt.steps.pair_state import PairState
from lightning_otrt.steps.stacking import Group, Stacks, group_pairs, stacked
from lightning_otrt.steps.step_graphs import Views
from lightning_otrt.steps.term_engine import Batch, TermEngine, Values, counts_of
from lightning_otrt.transport.cost import Evaluate, ValueAndGradient

__all__ = ["TransportEngine"]


class TransportEngine(TermEngine):
    """The engine of one process. See :class:`~lightning_otrt.steps.term_engine.TermEngine` for its arguments."""

    def reset(self) -> None:
        """Forget plans, statistics and counters."""
        super().reset()
        self._stacks = Stacks()

    def _values(self, batches: Sequence[Batch], samples: int, *, is_new: bool) -> Values:
        """Value and gradient of each pair that has any: observe, solve, evaluate."""
        counts = [counts_of(batch) for batch in batches]
        active = {index: self._usable_views(index, each) for index, each in enumerate(counts)}
        if self.calls == 0:
            self._inspect(batches)
        for state, each in zip(self.pairs, counts, strict=True):
            state.has_run = state.has_run or any(each)
        present = {index: [batches[index][view] for view in views] for index, views in active.items() if views}
        if is_new:
            for index, batch in present.items():
                self.couplings[index].prepare(self.pairs[index], *batch[0], self._places[index], index)
        groups = group_pairs(present, self.pairs, self.couplings)
        self._stacks.forget_all_but(groups)
        joined = {group: stacked([present[index] for index in group]) for group in groups}
        states = {group: self._stacks.join(group, self._states(group)) for group in groups}
        kind = is_new, *(self._is_due(group, state, is_new) for group, state in states.items())
        compute = partial(self._compute, samples, is_new)
        if all(self.couplings[group[0]].can_capture(due) for group, due in zip(states, kind[1:], strict=True)):
            found = self.graphs.run(compute, joined, states, kind)
        else:
            found = compute(joined, states)
        self.calls += is_new
        values: Values = {}
        for group, state in states.items():
            self._stacks.split(group, state, self._states(group))
            for number, index in enumerate(group if group in found else ()):
                rows = found[group]
                if len(group) > 1:
                    rows = [(value[number], gradient[number]) for value, gradient in rows]
                values[index] = dict(zip(active[index], rows, strict=True))
        return {index: values[index] for index in present if index in values}

    def _is_due(self, group: Group, state: PairState, is_new: bool) -> bool:
        return is_new and self.couplings[group[0]].is_due(state, self.calls)

    def _compute(
        self, samples: int, is_new: bool, batches: dict[Group, Views], states: Mapping[Group, PairState]
    ) -> dict[Group, list[ValueAndGradient]]:
        """Bring the states of the groups up to date; values and gradients of those with a plan, for each view."""
        evaluations: dict[Group, Evaluate] = {}
        if is_new:
            problems, evaluations = self._observe(batches, states, samples)
            self._solve(problems, states)
        values = {}
        for group, state in states.items():
            views, evaluate = batches.pop(group), evaluations.pop(group, None)
            if state.plan is not None:
                values[group] = [self.couplings[group[0]].value(state, y, x, evaluate) for y, x in views]
            del views, evaluate
        return values

    def _states(self, group: Group) -> list[PairState]:
        return [self.pairs[index] for index in group]

    def _observe(
        self, batches: Mapping[Group, Batch], states: Mapping[Group, PairState], samples: int
    ) -> tuple[dict[Group, Problem], dict[Group, Evaluate]]:
        """Feed the statistics.

        Returns:
            The problems of the groups whose plans are due; and what their values follow from, where that saves work.
        """
        problems, evaluations = {}, {}
        for group, batch in batches.items():
            y, x = batch[0] if len(batch) == 1 else (torch.cat(side, -1) for side in zip(*batch, strict=True))
            due = self.couplings[group[0]].observe(states[group], y, x, samples, self.calls)
            if due is not None:
                problems[group] = due.problem
                # Of several views the problem is that of all together.
                if due.evaluate is not None and len(batch) == 1:
                    evaluations[group] = due.evaluate
        return problems, evaluations

    def synchronize(self) -> None:
        """Nothing to do for a single process."""

    def release_ranks(self) -> None:
        """Nothing to do for a single process."""
