"""The distillation of logits over the steps of a run: soft targets, or a regression on running moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_otrt.notices import Notices, warn
from lightning_otrt.steps.process_checks import agree
from lightning_otrt.steps.ranks import Ranks
from lightning_otrt.steps.rounds import run_rounds
from lightning_otrt.transport.cost import Sums, all_finite, decay_and_add
from lightning_otrt.transport.gradient import attach_gradients
from lightning_otrt.transport.moments import centred
from lightning_otrt.transport.reference import move_reference
from lightning_otrt.transport.regression import Regression
from lightning_otrt.transport.soft_targets import soft_targets
from lightning_otrt.transport.tensors import common_dtype, count_bad, finite, joined, widest

__all__ = ["Distillation"]

#: ``(student, teacher, mask)`` of each view: logits ``(B, K, *positions)``, or neurons ``(N, n)`` and ``(K, n)``.
LogitViews: TypeAlias = Sequence[tuple[Tensor, Tensor, Tensor | None]]

#: Least decay of the moments behind the regression, and its ridge.
LEAST_MEMORY, RIDGE = 0.95, 1e-2


class Distillation:
    """The term of the logits.

    Args:
        temperature: T of the soft targets.
        strict: Raise on the first call if there are too few observations for a regression; else it is skipped.

    Attributes:
        calls: Number of calls so far.
        bad_calls: Number of calls since the last read whose value was not finite, on the device; None before the first.
    """

    def __init__(self, temperature: float, *, strict: bool = True) -> None:
        self.temperature, self._strict = temperature, strict
        self._regression = Regression(standardised=False, ridge=RIDGE)
        self.reset()

    def reset(self) -> None:
        """Forget the moments and the counters."""
        self.calls = 0
        self._notices = Notices(strict=self._strict)
        self.bad_calls: Tensor | None = None
        self._sums: Sums | None = None
        self._reference: tuple[Tensor, Tensor] | None = None
        self._map: Tensor | None = None
        self._memory: float | None = None
        #: Whether the processes of the global batch have compared their settings.
        self._is_agreed = False

    @property
    def has_moments(self) -> bool:
        """Whether the moments of some batch are kept."""
        return self._map is not None

    def term(
        self, views: LogitViews, ranks: Ranks | None, *, is_regression: bool, reevaluation: bool = False
    ) -> Tensor | None:
        """The term of one call, the mean over views; differentiable.

        Args:
            views: What was recorded. For soft targets the mask tells which positions count.
            ranks: The processes of the global batch, None for this one alone.
            is_regression: Whether the teacher's logits are regressed on the student's neurons.
            reevaluation: Whether this is the batch of the last call again. Moments and map then stay as they are.

        Returns:
            T² KL, or 1 - R², over the observations of all processes; None where these are too few for a regression.
            Gradients that the processes average are those of one process with all observations.

        Raises:
            ValueError: On the first call, if a value is not finite, or if ``strict`` and there are too few
                observations; on all processes, if it is so on one of them, or if they have other numbers of views.
        """
        if self.calls == 0 or (ranks is not None and not self._is_agreed):
            self._begin(views, ranks, is_regression=is_regression)
        with torch.autocast(views[0][0].device.type, enabled=False):
            if is_regression:
                total = self._regressed([common_dtype(y, x) for y, x, _ in views], ranks, is_new=not reevaluation)
            else:
                total = self._softened(views, ranks)
        if not reevaluation or self.calls == 0:
            self.calls += 1
        if total is None:
            return None
        self.bad_calls = count_bad(self.bad_calls, total)
        return total

    def _softened(self, views: LogitViews, ranks: Ranks | None) -> Tensor:
        found = [soft_targets(y, x, temperature=self.temperature, mask=mask) for y, x, mask in views]
        if ranks is None:
            return found[0].mean if len(found) == 1 else torch.stack([each.mean for each in found]).mean()
        everywhere = ranks.sum([(each.total.detach(), each.positions) for each in found])
        terms = []
        for own, (total, positions) in zip(found, everywhere, strict=True):
            positions = positions.clamp_min(1)
            local = own.total * (ranks.size / positions)
            # The value of all, with the gradient of the own part.
            terms.append(local + (total / positions - local).detach())
        return torch.stack(terms).mean()

    def _regressed(self, views: Sequence[tuple[Tensor, Tensor]], ranks: Ranks | None, *, is_new: bool) -> Tensor | None:
        with torch.no_grad():
            batches = [(y.detach(), x) for y, x in views]
            if not (
                self._observe(batches, ranks)
                if is_new or self._map is None
                else self._has_enough_on_all(batches, ranks)
            ):
                return None
            assert self._map is not None
            weights = self._map
            if ranks is None:
                values = [self._regression.value(y, x, weights) for y, x in batches]
            else:
                values = run_rounds([self._regression.shared_value(y, x, weights) for y, x in batches], ranks.sum)
            total = torch.stack([value for value, _ in values]).mean()
        factor = (1 if ranks is None else ranks.size) / len(views)
        students, gradients = [y for y, _ in views], [gradient for _, gradient in values]
        return attach_gradients(total, students, gradients, [factor] * len(views))

    def _has_enough_on_all(self, batches: Sequence[tuple[Tensor, Tensor]], ranks: Ranks | None) -> bool:
        """Whether the views have enough observations, where no exchange of moments tells."""
        return self._has_enough(batches, ranks.sum(_counts(batches)) if ranks is not None else None)

    def _observe(self, batches: Sequence[tuple[Tensor, Tensor]], ranks: Ranks | None) -> bool:
        """Add a batch to the moments, those of all processes on each of them, and solve the map.

        Returns:
            Whether the views have enough observations; else nothing is added.
        """
        if ranks is None and not self._has_enough(batches, None):
            return False
        y, x = joined(batches)
        self._check_state(y, x)
        if self._reference is None and not self._start(batches, y, x, ranks):
            return False
        assert self._reference is not None
        new = self._regression.sums(y, x, self._reference)
        if ranks is not None:
            new, counts = ranks.sum((new, _counts(batches)))
            if not self._has_enough(batches, counts):
                return False
        is_finite = all_finite(new)
        # A resumed run may compute in another type.
        running = [
            part.to(fresh.dtype) for part, fresh in zip(self._sums or map(torch.zeros_like, new), new, strict=True)
        ]
        assert self._memory is not None
        sums = decay_and_add(running, self._memory, new, is_finite)
        self._sums, self._reference = move_reference(sums, self._reference)
        solved = self._regression.solve(self._sums)
        older = torch.zeros_like(solved) if self._map is None else self._map
        self._map = torch.where(finite(solved.sum()), solved, older)
        return True

    def _start(self, batches: Sequence[tuple[Tensor, Tensor]], y: Tensor, x: Tensor, ranks: Ranks | None) -> bool:
        """Choose what depends on the first batch of all: the decay, and the points around which moments are taken.

        Returns:
            Whether the views of all processes have enough observations; else nothing is chosen.
        """
        sums = [side.sum(-1, dtype=widest(side)) for side in (y, x)]
        count: Tensor | int = y.shape[-1]
        if ranks is not None:
            sums, counts = ranks.sum((sums, _counts(batches)))
            if not self._has_enough(batches, counts):
                return False
            count = counts.sum()
        self._memory = _decay(float(count), y.shape[0])
        means = ((side / count).nan_to_num(0.0, 0.0, 0.0)[:, None].to(y.dtype) for side in sums)
        self._reference = next(means), next(means)
        return True

    def _begin(self, views: LogitViews, ranks: Ranks | None, *, is_regression: bool) -> None:
        """Check the first batch; processes compare what they exchange, since they would wait for each other else."""
        if ranks is None:
            self._check(views, is_regression=is_regression)
            return
        problem = ""
        if self.calls == 0:
            try:
                self._check(views, is_regression=is_regression)
            except ValueError as error:
                problem = str(error)
        agree(ranks, self._exchanged(views, is_regression=is_regression), problem)
        self._is_agreed = True

    def _exchanged(self, views: LogitViews, *, is_regression: bool) -> dict[str, Any]:
        """What all processes must have alike, by what it is."""
        sides = [common_dtype(y.detach(), x) for y, x, _ in views]
        return {
            "kind of distillation": "a regression of the logits" if is_regression else "soft targets",
            "forwards in a call": len(views),
            "neurons and logits": [
                ((y.shape[0], x.shape[0]) if is_regression else y.shape[1], str(y.dtype)) for y, x in sides
            ],
            "temperature": self.temperature,
            "calls so far": self.calls,
        }

    def _check(self, views: LogitViews, *, is_regression: bool) -> None:
        """Refuse a first batch with bad values, and warn of probabilities."""
        for y, x, mask in views:
            for side, name in ((y, "student"), (x, "teacher")):
                shown = (side if mask is None else torch.where(mask.unsqueeze(1), side, 0.0)).detach()
                if not is_regression and (unlike := _unlike_logits(shown, mask)):
                    warn(f"The logits of the {name} {unlike}")
                if not bool(shown.isfinite().all()):
                    raise ValueError(
                        f"The logits of the {name}, or what is regressed on, have NaN or infinite values (shape "
                        f"{tuple(side.shape)}), so that nothing can be distilled. Check its inputs and its weights; "
                        "classes that are masked by minus infinity cannot be compared."
                    )
        if is_regression and not any(_varies(x) for _, x, _ in views):
            warn(
                "The teacher's logits, which are regressed, do not vary over the first batch, up to what they have in "
                "common over classes and to classes that are masked by a huge negative value. So the term is 0 and has "
                "no gradient. Check the teacher's weights and `teacher_inputs`, or leave the distillation out."
            )

    def _check_state(self, y: Tensor, x: Tensor) -> None:
        if self._map is None:
            return
        if self._map.shape != (x.shape[0], y.shape[0]):
            raise ValueError(
                f"The regression of the teacher's logits has {y.shape[0]} student neurons and {x.shape[0]} logits, but "
                f"its moments, from earlier calls or from a checkpoint, are those of {self._map.shape[1]} and "
                f"{self._map.shape[0]}. Use the networks of that run, or call `reset()` to start anew."
            )
        if (self._map.dtype, self._map.device) != (y.dtype, y.device):
            assert self._reference is not None
            assert self._sums is not None
            self._map = self._map.to(y)
            self._reference = self._reference[0].to(y), self._reference[1].to(y)
            self._sums = [part.to(y.device) for part in self._sums]

    def _has_enough(self, views: Sequence[tuple[Tensor, Tensor]], total: Tensor | None) -> bool:
        """Whether each view has enough observations. If not, a strict first call raises, and others warn.

        Args:
            views: The views of this process.
            total: The observations of each view on all processes; None for those of this one alone.
        """
        fewest, needed = min(y.shape[-1] for y, _ in views), self._regression.min_observations
        # With enough of its own a process knows that all have enough together. Others read the total, and wait.
        if fewest < needed and total is not None:
            fewest = int(total.min())
        if fewest >= needed:
            return True
        message = f"The regression of the teacher's logits has {fewest} observations, and needs at least {needed}"
        skipped = f"{message}: it is skipped for such batches. Use drop_last=True."
        if self.calls == 0:
            self._notices.fail(ValueError(f"{message}. Use a larger batch."), otherwise=skipped, key="few")
        self._notices.warn(skipped, key="few")
        return False

    def state_dict(self) -> dict[str, Any]:
        """Counter and moments; plain tensors, lists and numbers."""
        return {
            "calls": self.calls,
            "sums": None if self._sums is None else list(self._sums),
            "reference": None if self._reference is None else list(self._reference),
            "map": self._map,
            "memory": self._memory,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore :meth:`state_dict`.

        Args:
            state: What it returned.
            device: Device of the student.
        """
        self.reset()
        self.calls = state["calls"]
        if state["map"] is None:
            return
        self._map, self._memory = state["map"].to(device), state["memory"]
        self._sums = [part.to(device) for part in state["sums"]]
        y, x = state["reference"]
        self._reference = y.to(device), x.to(device)


def _varies(neurons: Tensor) -> bool:
    """Whether some neuron ``(K, n)`` carries anything for a regression, or there are too few observations to tell."""
    return neurons.shape[-1] < Regression.min_observations or bool(centred(neurons)[1].any())


def _counts(views: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The observations of each view, on the device."""
    return torch.stack([y.new_full((), y.shape[-1]) for y, _ in views])


def _decay(observations: float, neurons: int) -> float:
    """The decay with which the moments hold at least four times as many observations as there are neurons.

    A map from fewer predicts the batch that it was solved from whatever that is, and the term has no gradient. It is
    chosen in the first call, where processes read how many they have together.

    Example:
        >>> _decay(64, 128), _decay(16, 1024)
        (0.95, 0.99609375)
    """
    return max(LEAST_MEMORY, 1 - observations / (4 * neurons))


def _unlike_logits(values: Tensor, mask: Tensor | None) -> str:
    """Why values ``(B, K, *positions)`` are no logits, as far as they show it; waits for the device.

    Args:
        values: The values.
        mask: ``(B, *positions)``, true at valid positions, or None.
    """
    rows = values.movedim(1, -1)
    rows = rows.flatten(0, -2) if mask is None else rows[mask]
    if not len(rows):
        return ""
    # Of labels each "no" is 0, and says nothing.
    labels = rows[:, :1] if rows.shape[1] == 2 and not bool(rows[:, 1].any()) else rows
    sums_to_1 = bool(((rows.sum(1) - 1).abs() < 1e-3).all())
    is_positive = bool((rows >= 0).all())
    if is_positive and sums_to_1:
        return (
            "look like probabilities: none is negative, and they sum to 1. A softmax is taken of them once more, which "
            "leaves almost no difference between classes. Leave the softmax out of the network, or return its "
            "logarithm."
        )
    # Those of an untrained network may lie between 0 and 1, too, but not near both.
    if is_positive and bool((labels <= 1).all() & (labels.amax() > 0.9) & (labels.amin() < 0.1)):
        return (
            "look like probabilities of single labels: all are between 0 and 1. A softmax is taken of them, or a "
            "sigmoid once more. Return what enters the sigmoid, and pass LogitDistillation(activation='sigmoid')."
        )
    if bool(((rows.square().sum(1) - 1).abs() < 1e-3).all()):
        return (
            "have a length of 1 in each sample, as normalised embeddings have. A softmax of them says nothing of "
            "classes. Leave `distillation` out, or let the teacher's output be regressed on a layer of the student: "
            "LogitDistillation(features='name of the layer')."
        )
    return ""
