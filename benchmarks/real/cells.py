"""What is run: each cell is a pair of networks on a data set with so many labels, tuned on its own validation data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.evidence.experiments import Experiment
from benchmarks.evidence.runs import Results
from benchmarks.evidence.tuning import SEEDS as TUNING_SEEDS
from benchmarks.evidence.tuning import Tuning
from benchmarks.real.methods import METHODS, candidates, methods_of

#: Paired seeds of each cell.
SEEDS = 5
BATCH_SIZE = 32
#: Names of the data sets in tables.
DATA = {
    "emoji": "emoji, 22 subcategories",
    "other emoji": "emoji, 22 other subcategories",
    "fashion": "Fashion-MNIST",
    "digits": "handwritten digits of MNIST",
    "sections": "Debian sections, 12 classes",
    "24 sections": "Debian sections, 24 classes",
}


@dataclass(frozen=True)
class CellTuning(Tuning):
    """Choices of one cell: on validation data, with the tuning seeds of all benchmarks."""

    teacher_seed: int = 0
    batch_size: int = BATCH_SIZE

    def candidates(self, method: str) -> list[tuple[float, float, float]]:
        """Learning rate, weight decay and weight of each candidate of a method."""
        return candidates(method, kind_of(self.setting, self.target))

    def edge(self, method: str, results: Results) -> bool:
        """Whether the chosen learning rate is the smallest or the largest."""
        rates = sorted({run.lr for run in self.runs(method, TUNING_SEEDS[0])})
        return len(rates) > 1 and self.choice(method, results).lr in (rates[0], rates[-1])


def kind_of(setting: str, target: str) -> str:
    """Which grids a cell uses."""
    return "fine-tuning" if setting == "copied" else "texts" if target == "sections" else "images"


def _cell(pair: str, target: str, per_class: int, steps: int, setting: str = "scratch") -> Experiment:
    """A cell whose runs have ``steps`` steps; its tuning has half as many, for all methods alike."""
    tuning = CellTuning(setting, target=target, per_class=per_class, pair=pair, steps=steps // 2)
    title = f"{pair.replace('->', '→')}, {DATA[target]}, {per_class} per class, {steps} steps"
    changes = {"teacher_seed": 0, "steps": steps}
    return Experiment(title, tuning, (target,), methods_of(setting), (per_class,), SEEDS, changes=changes)


_RESNET, _MOBILENET = "EfficientNet-Lite0 -> ResNet-10", "EfficientNet-Lite0 -> MobileNetV2 0.35"
_SMALL, _LARGER = "MiniLM -> BERT 2 × 128", "MiniLM -> BERT 3 × 192"
_COPY = "EfficientNet-Lite0 -> itself"

#: By name, in the order in which they are run: first one of each kind.
CELLS: Mapping[str, Experiment] = {
    "emoji-5-resnet10": _cell(_RESNET, "emoji", 5, 200),
    "sections-20-bert2": _cell(_SMALL, "sections", 20, 200),
    "fashion-20-resnet10": _cell(_RESNET, "fashion", 20, 200),
    "emoji-5-finetune": _cell(_COPY, "emoji", 5, 60, "copied"),
    "emoji-20-resnet10": _cell(_RESNET, "emoji", 20, 400),
    "sections-100-bert2": _cell(_SMALL, "sections", 100, 400),
    "fashion-100-resnet10": _cell(_RESNET, "fashion", 100, 400),
    "emoji-5-mobilenet": _cell(_MOBILENET, "emoji", 5, 200),
    "sections-20-bert3": _cell(_LARGER, "sections", 20, 200),
    "fashion-20-mobilenet": _cell(_MOBILENET, "fashion", 20, 200),
    "fashion-20-finetune": _cell(_COPY, "fashion", 20, 60, "copied"),
    "emoji-20-mobilenet": _cell(_MOBILENET, "emoji", 20, 400),
    "emoji-20-finetune": _cell(_COPY, "emoji", 20, 120, "copied"),
    "sections-100-bert3": _cell(_LARGER, "sections", 100, 400),
    "fashion-100-mobilenet": _cell(_MOBILENET, "fashion", 100, 400),
    "fashion-100-finetune": _cell(_COPY, "fashion", 100, 120, "copied"),
    "sections-1000-bert2": _cell(_SMALL, "sections", 1000, 1000),
    "fashion-1000-resnet10": _cell(_RESNET, "fashion", 1000, 1000),
    "sections-1000-bert3": _cell(_LARGER, "sections", 1000, 1000),
    "fashion-1000-mobilenet": _cell(_MOBILENET, "fashion", 1000, 1000),
    "fashion-1000-finetune": _cell(_COPY, "fashion", 1000, 500, "copied"),
}


def quick(cell: Experiment) -> Experiment:
    """Four steps and one seed: to see that everything runs, not to claim anything."""
    return replace(cell, tuning=replace(cell.tuning, steps=2), seeds=1, changes={**cell.changes, "steps": 4})


def label(method: str) -> str:
    """The name of a method in tables."""
    return METHODS[method].label
