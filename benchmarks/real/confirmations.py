"""Tasks on which nothing was chosen: each takes over what another cell has tuned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from benchmarks.evidence.experiments import Experiment
from benchmarks.evidence.runs import Results, Run
from benchmarks.real.cells import CELLS, DATA, CellTuning
from benchmarks.real.methods import DEFAULT, ORTHOGONAL, PLAIN

#: Plain training, rivals (L2-SP in fine-tuning), the default, the recipe with and without distillation beside their
#: controls, and the frozen teacher.
METHODS = (
    *(PLAIN, "kd", "fitnets", "cka", "l2-sp", DEFAULT, ORTHOGONAL, "random-orthogonal"),
    *("orthogonal+kd", "random-orthogonal+kd", "frozen"),
)


@dataclass(frozen=True)
class TakenOver(CellTuning):
    """The choices of another cell, whose fields it has.

    Attributes:
        cell: Name of that cell.
    """

    cell: str = ""

    def choices(self, methods: Iterable[str], results: Results) -> dict[str, Run]:
        """The choice of each method.

        Raises:
            ValueError: If the other cell is not tuned for one of them.
        """
        found = {method: self.choice_or_none(method, results) for method in methods}
        if missing := [method for method, choice in found.items() if choice is None]:
            raise ValueError(
                f"The cell {self.cell} has not tuned {missing}. Run it first: `python -m benchmarks.real --cells "
                f"{self.cell}`."
            )
        return {method: choice for method, choice in found.items() if choice is not None}

    def choice(self, method: str, results: Results) -> Run:
        """What the other cell chose."""
        return super().choice(method, self._rows(results))

    def choice_or_none(self, method: str, results: Results) -> Run | None:
        """The choice, None where the tuning of the other cell is not complete."""
        return super().choice_or_none(method, self._rows(results))

    def mean(self, run: Run, results: Results) -> float:
        """Validation accuracy in the other cell."""
        return super().mean(run, self._rows(results))

    def _rows(self, results: Results) -> Results:
        """The rows of the other cell. Their file lies beside that of this one."""
        return Results(results.path.with_name(f"{self.cell}.jsonl"))


def _confirmation(cell: str, *, target: str = "", pair: str = "", per_class: int = 0, steps: int = 0) -> Experiment:
    """A cell with other data, another pair of networks or more labels, where these are given."""
    theirs = CELLS[cell]
    assert isinstance(theirs.tuning, CellTuning)
    tuning = TakenOver(**vars(theirs.tuning), cell=cell)
    target, pair = target or theirs.targets[0], pair or theirs.tuning.pair
    count, steps = per_class or theirs.per_class[0], steps or theirs.changes["steps"]
    title = f"{pair.replace('->', '→')}, {DATA[target]}, {count} per class, {steps} steps"
    if per_class:
        title += f", options of {theirs.per_class[0]} per class"
    changes = {**theirs.changes, "pair": pair, "steps": steps}
    return replace(
        theirs,
        title=title,
        tuning=tuning,
        targets=(target,),
        methods=tuple(name for name in theirs.methods if name in METHODS),
        per_class=(count,),
        changes=changes,
    )


_OTHER_TEACHER = "EfficientNet-Lite2 -> ResNet-10"

#: By name, in the order in which they are run.
CONFIRMATIONS: Mapping[str, Experiment] = {
    "digits-20-resnet10": _confirmation("fashion-20-resnet10", target="digits"),
    "sections24-20-bert2": _confirmation("sections-20-bert2", target="24 sections"),
    "other-emoji-5-resnet10": _confirmation("emoji-5-resnet10", target="other emoji"),
    "emoji-5-lite2": _confirmation("emoji-5-resnet10", pair=_OTHER_TEACHER),
    "fashion-20-lite2": _confirmation("fashion-20-resnet10", pair=_OTHER_TEACHER),
    "many-fashion-resnet10": _confirmation("fashion-100-resnet10", per_class=1000, steps=1000),
    "many-sections-bert2": _confirmation("sections-100-bert2", per_class=1000, steps=1000),
    "more-fashion-finetune": _confirmation("fashion-20-finetune", per_class=100, steps=120),
    "many-sections-bert3": _confirmation("sections-100-bert3", per_class=1000, steps=1000),
    "more-fashion-mobilenet": _confirmation("fashion-20-mobilenet", per_class=100, steps=400),
    "many-fashion-mobilenet": _confirmation("fashion-20-mobilenet", per_class=1000, steps=1000),
    "many-fashion-finetune": _confirmation("fashion-20-finetune", per_class=1000, steps=500),
}
