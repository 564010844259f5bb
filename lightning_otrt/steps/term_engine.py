"""The transport term over the steps of a training run: what an engine of one process and one of several have alike.

``engine.py`` and ``global_engine.py`` find value and gradient of each pair. Here are the term that follows from them,
the checks of a batch, and the state of a run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_otrt.notices import Notices
from lightning_otrt.steps.call import Batch, Call
from lightning_otrt.steps.coupling import Coupling, Problem
from lightning_otrt.steps.first_batch import inspect_batch
from lightning_otrt.steps.kinds import get_coupling
from lightning_otrt.steps.pair_distance import PairDistance
from lightning_otrt.steps.pair_state import PairState
from lightning_otrt.steps.settings import TermSettings
from lightning_otrt.steps.solving import solve_plans
from lightning_otrt.steps.stacking import Group
from lightning_otrt.steps.step_graphs import StepGraphs
from lightning_otrt.transport.cost import ValueAndGradient
from lightning_otrt.transport.gradient import attach_gradients
from lightning_otrt.transport.orthogonal import Alignment
from lightning_otrt.transport.plans import ORTHOGONAL
from lightning_otrt.transport.tensors import common_dtype, count_bad, without_autocast

__all__ = ["TermEngine", "Values"]

#: Value and gradient of each pair in the term, for each view in which its layers ran.
Values: TypeAlias = dict[int, dict[int, ValueAndGradient]]


class TermEngine(ABC):
    """Turns the neurons of all pairs of a call into one differentiable term.

    Args:
        names: ``(student layer, teacher layer)`` of each pair.
        weights: Weight of each pair. They sum to 1.
        settings: The settings of the term.
        plans: Kind of plan of each pair, where that of the settings is ``"auto"``.
        graphs: Where calls that were captured as CUDA graphs are kept.

    Attributes:
        plans: Kind of plan of each pair.
        calls: Number of calls so far.
        solved_samples: Samples of the last call in which plans were due; 0 if it had too few to solve them again.
        states: What is kept of each pair.
        graphs: The calls that were captured as CUDA graphs.
        bad_calls: Number of calls since the last read whose value was not finite, on the device; None before the first.
        processes: Number of processes that average their gradients of the same term.
        is_global: Whether the batch is that of several processes.
    """

    processes = 1
    is_global = False

    def __init__(
        self,
        names: Sequence[tuple[str, str]],
        weights: Sequence[float],
        settings: TermSettings,
        plans: Sequence[str] = (),
        *,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.names, self.weights, self.settings, self.cost = names, weights, settings, settings.cost
        #: The layers of each pair, for errors.
        self._places = [f"{student!r} -> {teacher!r}" for student, teacher in names]
        self._use(plans or [settings.plan] * len(names))
        #: What needs no correlations, for errors.
        self._otherwise = "cost='euclidean'"
        if settings.plan in (*ORTHOGONAL, "auto"):
            self._otherwise = f"plan='sinkhorn' with {self._otherwise}"
        self.graphs = StepGraphs() if graphs is None else graphs
        self.reset()

    def _use(self, plans: Sequence[str]) -> None:
        """Make the couplings of the pairs, one for each kind of plan."""
        self.plans = tuple(plans)
        made = {plan: get_coupling(plan, self.settings) for plan in dict.fromkeys(plans)}
        self.couplings: list[Coupling] = [made[plan] for plan in plans]

    def reset(self) -> None:
        """Forget plans, statistics and counters."""
        self.calls = 0
        self._notices = Notices(strict=self.settings.strict)
        self.solved_samples: int | Tensor = 0
        self.states = [PairState() for _ in self.names]
        self.graphs.forget()
        self.bad_calls: Tensor | None = None

    def term(
        self,
        views: Sequence[Sequence[tuple[Tensor, Tensor]]],
        samples: int,
        *,
        absent: Collection[int] = (),
        reevaluation: bool = False,
    ) -> tuple[Tensor, list[PairDistance]]:
        """The term of one call.

        Args:
            views: For each view, the neurons ``(N, n)`` and ``(M, n)`` of each pair. A pair whose layers did not run in
                a view has no observations there: ``(N, 0)`` and ``(M, 0)``.
            samples: Number of samples in all views.
            absent: The pairs that ran in no view, whose lack of observations is no fault of the batch.
            reevaluation: Whether this is the batch of the last call again, as in the closures of LBFGS. Plans and
                statistics then stay as they are.

        Returns:
            Σ_pairs w_pair · mean over views of ⟨P, M⟩, differentiable once, and the distance of each pair. The mean is
            that of the views in which the pair ran. A pair that ran in none, or has too few observations, is missing
            from the sum, and the others keep their weights.

        Raises:
            ValueError: On the first call, if a value is not finite, or if ``strict`` and there are too few
                observations. On any call, if a pair has other numbers of neurons than its plan.
        """
        with torch.no_grad(), without_autocast(views[0][0][0]):
            batches = [[common_dtype(y.detach(), x.detach()) for y, x in pair] for pair in zip(*views, strict=True)]
            counts = [[y.shape[-1] for y, _ in batch] for batch in batches]
            call = Call(batches, counts, samples, absent, is_new=self.calls == 0 or not reevaluation)
            values = self._values(call)
            total, distances = self._total(call, values)
        return self._attach(total, views, values), distances

    def absent_pairs(self) -> list[int]:
        """The pairs whose layers did not run in any call so far, on any process."""
        return [index for index, state in enumerate(self.states) if not state.has_run]

    @abstractmethod
    def _values(self, call: Call) -> Values:
        """Value and gradient of each pair that has any."""

    def _compare_size(self, samples: int | Tensor) -> bool | Tensor:
        """Compare a call in which plans are due with the last such call, and keep its size for the next.

        Below half of its samples a batch is too small for plans that can wait, as the last one of an epoch may be. But
        not twice in a row: batches may stay smaller.

        Args:
            samples: Samples of the call.

        Returns:
            Whether the batch is too small; on the device, if the samples are.
        """
        is_small = 2 * samples < self.solved_samples
        self.solved_samples = samples * ~is_small if isinstance(is_small, Tensor) else 0 if is_small else samples
        return is_small

    def _solve(
        self, problems: dict[Group, Problem], states: Mapping[Group, PairState], is_small: Tensor | None = None
    ) -> None:
        """Solve the plans of each problem, all of which are taken out of ``problems``.

        Args:
            problems: The problems by group of pairs.
            states: The states of the groups.
            is_small: Whether plans that can wait stay as they are, where that is known on the device alone.
        """
        new = {group for group in problems if states[group].plan is None}
        for group in new:
            self.cost.check_matrix(problems[group][0])
        for coupling in dict.fromkeys(self.couplings):
            own = {group: problems.pop(group) for group in list(problems) if self.couplings[group[0]] is coupling}
            for group, solved in solve_plans(coupling, own, states):
                if is_small is not None and coupling.can_wait(states[group]):
                    solved = solved._replace(is_finite=solved.is_finite & ~is_small)
                states[group].keep(solved)
                for number, index in enumerate(group if group in new else ()):
                    plan = solved.plan
                    if len(group) > 1:
                        plan = type(plan)(*(part[number] for part in plan))
                    for message in coupling.inspect(self.names[index], plan):
                        self._notices.warn(message)

    def _total(self, call: Call, values: Values) -> tuple[Tensor, list[PairDistance]]:
        """The weighted sum over pairs, and the distance of each."""
        total: Tensor | None = None
        distances = []
        for index, state in enumerate(self.states):
            if index in values:
                parts = [value for value, _ in values[index].values()]
                value = parts[0] if len(parts) == 1 else torch.stack(parts).mean()
                weight = self.weights[index]
                total = value * weight if total is None else torch.add(total, value, alpha=weight)
            else:
                value = call.batches[index][0][0].new_full((), float("nan"))
            matrix = None if state.plan is None else state.plan.matrix
            name, skipped = self.names[index][0], index not in values
            observations = self.processes * sum(call.counts[index])
            alignment = state.plan if isinstance(state.plan, Alignment) else None
            distances.append(PairDistance(name, value, matrix, state.memory, observations, skipped, alignment))
        if total is None:
            total = call.batches[0][0][0].new_zeros(())
        self.bad_calls = count_bad(self.bad_calls, total)
        return total, distances

    def _attach(
        self,
        total: Tensor,
        views: Sequence[Sequence[tuple[Tensor, Tensor]]],
        values: Values,
    ) -> Tensor:
        """The total with its gradients for the student neurons of all views."""
        inputs, gradients, factors = [], [], []
        for index, results in values.items():
            for view, (_, gradient) in results.items():
                student = views[view][index][0]
                inputs.append(student)
                gradients.append(gradient.to(student.dtype))
                factors.append(self.weights[index] / len(results) * self.processes)
        with torch.enable_grad():
            return attach_gradients(total, inputs, gradients, factors)

    def _usable_views(self, call: Call, index: int, counts: Sequence[int]) -> list[int]:
        """The views in which a pair ran, by the observations of each; none if one of them has too few."""
        if not any(counts) and index in call.absent:
            return []
        fewest = min(filter(None, counts), default=0)
        return [view for view, count in enumerate(counts) if count] if self._has_enough(index, fewest) else []

    def _has_enough(self, index: int, count: int) -> bool:
        """Whether a pair has enough observations for a term. If not, a strict first call raises, and others warn."""
        if count >= self.cost.min_observations:
            return True
        message = (
            f"{self._places[index]} has {count} observations, and {self.cost.name!r} needs at least "
            f"{self.cost.min_observations}"
        )
        skipped = f"{message}: the pair is skipped for such batches. Use drop_last=True."
        if self.calls == 0:
            advice = f"Use a larger batch, layers with positions or tokens, or {self._otherwise}."
            self._notices.fail(ValueError(f"{message}. {advice}"), otherwise=skipped)
        self._notices.warn(skipped)
        return False

    def _inspect(self, batches: Sequence[Batch]) -> None:
        """Refuse a first batch with bad values, and warn of what will train badly."""
        for names, batch in zip(self.names, batches, strict=True):
            for y, x in batch:
                if y.shape[-1]:
                    for message in inspect_batch(names, y, x, self.cost, self.settings.epsilon, self._otherwise):
                        self._notices.warn(message)

    @abstractmethod
    def synchronize(self) -> None:
        """Bring statistics of several processes together before one of them saves."""

    @abstractmethod
    def release_ranks(self) -> None:
        """Let go of a process group that is about to end."""

    def state_dict(self) -> dict[str, Any]:
        """Counters, plans, potentials and statistics: what a resumed run needs to go on as if it had not stopped."""
        return {
            "names": [list(name) for name in self.names],
            "settings": {
                "cost": self.cost.name,
                "plan": self.settings.plan,
                "plans": list(self.plans),
                "memory": self.settings.memory,
            },
            "calls": self.calls,
            "solved_samples": int(self.solved_samples),
            "pairs": [state.state_dict() for state in self.states],
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore :meth:`state_dict`.

        Args:
            state: What :meth:`state_dict` returned.
            device: Device of the student.

        Raises:
            ValueError: As for :meth:`check_state`.
        """
        self.check_state(state)
        settings = state["settings"]
        self.calls = state["calls"]
        self.solved_samples = state.get("solved_samples", 0)  # missing in checkpoints of earlier versions
        self._use(settings["plans"])
        self.states = [
            PairState.of(pair, coupling.resumed_memory(pair["memory"], settings["memory"]), device, coupling.plan_type)
            for pair, coupling in zip(state["pairs"], self.couplings, strict=True)
        ]

    def continue_from(self, before: TermEngine, device: torch.device) -> None:
        """Go on where another engine for the same pairs stopped."""
        self.load_state_dict(before.state_dict(), device)

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a state that does not belong to this engine.

        Raises:
            ValueError: If it was saved with other layers, another cost or another kind of plan.
        """
        saved = [tuple(name) for name in state["names"]]
        if saved != [tuple(name) for name in self.names]:
            raise ValueError(
                f"The checkpoint was saved with the layer pairs {saved}, but this run has {list(self.names)}. "
                "Resume with the same `layers`, or load the weights alone."
            )
        settings = state["settings"]
        for name, own in (("cost", self.cost.name), ("plan", self.settings.plan)):
            if settings[name] != own:
                raise ValueError(
                    f"The checkpoint was saved with {name}={settings[name]!r}, but this run has {name}={own!r}. "
                    f"Statistics and plans of one do not fit the other. Resume with the same `{name}`, or load "
                    "the weights alone."
                )
