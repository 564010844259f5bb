"""Which weight suits real checkpoints: ``python -m benchmarks.real.weights``, 25 minutes of one core.

A fixed weight and what `suggest_weight` says differ on deep networks. So students of two cells of
``python -m benchmarks.real`` are trained with weights around both, and with the suggested one, on validation samples,
with the learning rate that tuning chose for the method. Rows are appended to a file; the command continues where it was
stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.evidence.report import gather
from benchmarks.evidence.runs import Results, Run, complete
from benchmarks.evidence.statistics import estimate
from benchmarks.pages import write_page
from benchmarks.real.__main__ import RESULTS
from benchmarks.real.cells import CELLS, label
from benchmarks.real.data import Samples
from benchmarks.real.methods import DEFAULT, ORTHOGONAL, PLAIN
from benchmarks.real.training import Problem, execute, names_of, new_student, problem_of, teacher_of
from lightning_otrt import OTRTCallback, suggest_weight

WEIGHTS = (2.0, 8.0, 32.0, 128.0)
SEEDS = (2000, 2001, 2002)
_CELLS = ("emoji-5-resnet10", "sections-20-bert2")
_PLANS = {DEFAULT: "sinkhorn", ORTHOGONAL: "orthogonal"}


class Task(pl.LightningModule):
    """A student as users have it.

    Args:
        net: The student.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[dict[str, Tensor], Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of a batch."""
        inputs, labels = batch
        logits = self.net(inputs["images"]) if "images" in inputs else self.net(**inputs)
        return F.cross_entropy(logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Not used: nothing is trained here."""
        return torch.optim.AdamW(self.parameters())


def batches(samples: Samples, count: int = 4) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Some batches of 32."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    for indices in order.split(32)[:count]:
        yield dict(samples.batch(indices).inputs), samples.labels[indices]


def suggested(run: Run, problem: Problem, plan: str) -> float:
    """What `suggest_weight` says before training."""
    task = Task(new_student(run, problem.num_classes))
    callback = OTRTCallback(teacher_of(names_of(run)[0]), plan=plan)
    return float(suggest_weight(task, callback, list(batches(problem.train))).weight)


def runs(cell: str, method: str) -> dict[float, list[Run]]:
    """The runs of a method by weight; plain training has weight 0."""
    one = gather(Results(RESULTS / f"{cell}.jsonl"), {cell: CELLS[cell]})[cell]
    target, per_class = one.experiment.targets[0], one.experiment.per_class[0]
    base = replace(one.experiment.run(method, one.choices[method], target, per_class, 0), split="validation")
    weights = (0.0,) if method == PLAIN else WEIGHTS
    return {weight: [replace(base, weight=weight, seed=seed) for seed in SEEDS] for weight in weights}


def with_suggested(runs: list[Run], plan: str) -> list[Run]:
    """The runs with the weight that is suggested on the first seed, rounded so that it is the same on all machines."""
    weight = float(round(suggested(runs[0], problem_of(runs[0]), plan)))
    return [replace(run, weight=weight) for run in runs]


def main() -> None:
    """Run what is missing, and write the page."""
    torch.set_num_threads(1)
    results = Results(RESULTS / "weights.jsonl")
    planned = {(cell, method): runs(cell, method) for cell in _CELLS for method in (PLAIN, *_PLANS)}
    everything = [run for by_weight in planned.values() for run in itertools.chain(*by_weight.values())]
    complete(everything, results, execute, title="weights")
    own = {
        (cell, method): with_suggested(planned[cell, method][WEIGHTS[0]], plan)
        for cell in _CELLS
        for method, plan in _PLANS.items()
    }
    complete(list(itertools.chain(*own.values())), results, execute, title="suggested weights")
    lines = [
        "# Weight on real checkpoints",
        "",
        "`python -m benchmarks.real.weights`: validation accuracy in % of students from scratch, three seeds with 95 % "
        "intervals, by the weight of the term. *Suggested* is what `suggest_weight` says before training, on one seed "
        "and rounded; the number behind it is the accuracy with that weight.",
        "",
        f"| cell | plan | plain | {' | '.join(f'{weight:g}' for weight in WEIGHTS)} | suggested |",
        f"|---|---|---|{'---|' * (len(WEIGHTS) + 1)}",
    ]
    for cell in _CELLS:
        plain = _accuracy(planned[cell, PLAIN][0.0], results)
        for method in _PLANS:
            values = [_accuracy(planned[cell, method][weight], results) for weight in WEIGHTS]
            one = own[cell, method]
            values.append(f"{one[0].weight:g}: {_accuracy(one, results)}")
            lines.append(f"| {cell} | {label(method)} | {plain} | {' | '.join(values)} |")
    print(write_page("\n".join(lines), RESULTS.parent))


def _accuracy(runs: list[Run], results: Results) -> str:
    return str(estimate([results.rows[run.key]["accuracy"] for run in runs]))


if __name__ == "__main__":
    main()
