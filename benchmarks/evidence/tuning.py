"""The same tuning budget for every method: nine candidates on one tuning seed, the best two on a second.

Choices are made on the validation fonts of a-z (or on validation digits), with seeds and a teacher that serve nothing
else. No image or font of a reported target decides anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from benchmarks.evidence.methods import METHODS, candidates
from benchmarks.evidence.runs import Results, Run

SEEDS = (1000, 1001)
TEACHER_SEED = 100
FINALISTS = 2


@dataclass(frozen=True)
class Tuning:
    """On what a setting is tuned.

    Attributes:
        setting: The setting.
        target: Whose validation images choose.
        per_class: Labelled images of each class.
        pool: Whether the transfer terms see a pool.
        pair: The architectures.
        steps: Steps of the student.
        teacher_steps: Steps of the teacher.
        teacher_seed: Decides the teacher.
        batch_size: Images of a batch.
    """

    setting: str
    target: str = "lowercase"
    per_class: int = 10
    pool: bool = False
    pair: str = "conv"
    steps: int = 400
    teacher_steps: int = 800
    teacher_seed: int = TEACHER_SEED
    batch_size: int = 64

    def runs(self, method: str, seed: int) -> list[Run]:
        """The candidates of a method on one tuning seed."""
        return [
            Run(
                setting=self.setting,
                target=self.target,
                method=method,
                lr=lr,
                weight_decay=weight_decay,
                weight=weight,
                seed=seed,
                teacher_seed=self.teacher_seed,
                split="validation",
                per_class=self.per_class,
                pool=self.pool,
                pair=self.pair,
                steps=self.steps,
                teacher_steps=self.teacher_steps,
                batch_size=self.batch_size,
            )
            for lr, weight_decay, weight in self.candidates(method)
        ]

    def candidates(self, method: str) -> list[tuple[float, float, float]]:
        """Learning rate, weight decay and weight of each candidate of a method."""
        return candidates(method, self.setting, self.pair)

    def first(self, methods: Iterable[str]) -> list[Run]:
        """All candidates on the first seed."""
        return [run for method in methods for run in self.runs(method, SEEDS[0])]

    def second(self, methods: Iterable[str], results: Results) -> list[Run]:
        """The best candidates of each method on the second seed."""
        return [replace(run, seed=SEEDS[1]) for method in methods for run in self._finalists(method, results)]

    def _finalists(self, method: str, results: Results) -> list[Run]:
        runs = self.runs(method, SEEDS[0])
        return sorted(runs, key=lambda run: -results[run]["accuracy"])[:FINALISTS]

    def choice(self, method: str, results: Results) -> Run:
        """The best candidate by its mean over both seeds."""
        finalists = self._finalists(method, results)
        return max(finalists, key=lambda run: self.mean(run, results))

    def choice_or_none(self, method: str, results: Results) -> Run | None:
        """The choice, None where the tuning of this method is not complete."""
        if not all(run in results for run in self.first([method])):
            return None
        return self.choice(method, results) if all(run in results for run in self.second([method], results)) else None

    def mean(self, run: Run, results: Results) -> float:
        """Validation accuracy of a finalist, the mean over both seeds."""
        return sum(results[replace(run, seed=seed)]["accuracy"] for seed in SEEDS) / len(SEEDS)

    def edge(self, method: str, results: Results) -> bool:
        """Whether the chosen weight is the smallest or the largest of several candidates."""
        weights = METHODS[method].weights
        return len(weights) > 1 and self.choice(method, results).weight in (min(weights), max(weights))


def tune(
    tuning: Tuning, methods: list[str], results: Results, complete: Callable[[list[Run], str], None]
) -> dict[str, Run]:
    """Run what is missing and choose.

    Returns:
        The chosen candidate of each method.
    """
    complete(tuning.first(methods), "tuning")
    complete(tuning.second(methods, results), "tuning, second seed")
    return {method: tuning.choice(method, results) for method in methods}
