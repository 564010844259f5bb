"""What ``teacher_cache`` saves: ``python -m benchmarks.teacher_cache [--quick]``.

Steps of a student on one thread: plain, with the teacher on each batch, and with a cache in the first epoch, in later
ones and from the folder of an earlier run. The floor is the plain step with the matching, for readings of the teacher
that are at hand. Rounds are interleaved, and ratios taken within a round, of processor time. Then a sweep of five fits
that share a folder, and five without a cache. Needs ``pip install -e ".[benchmarks]"`` and the weights of
``benchmarks/real``. Writes ``results/teacher_cache.md`` and its ``.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.pages import RESULTS, write_page
from benchmarks.real.checkpoints import efficientnet_lite
from benchmarks.real.networks import LENGTH, ResNet10, bert, sentence_encoder
from benchmarks.timing import Quartiles, processor_clock, ratios
from lightning_otrt import LayerPair, RepresentationTransfer, TransferWarning
from lightning_otrt.layers.pairs import LayerSpec

CLASSES = 10
FITS = 5
#: Epochs of a fit: the figures of shorter fits are those of the first epochs.
EPOCHS = (6, 20)
#: Batches of each of these epochs.
SWEPT = 4
#: Kinds of steps.
PLAIN, AT_HAND, WITHOUT, FIRST, LATER, FOLDER = (
    "plain",
    "floor",
    "without a cache",
    "first epoch",
    "later epochs",
    "from a folder",
)
CACHED = (FIRST, LATER, FOLDER)
#: How many times cheaper later epochs and the sweep have to be, and how near to the floor.
LATER_LIMIT, SWEEP_LIMIT, FLOOR_LIMIT = 2.0, 2.2, 1.15

Batch = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """A teacher, students and data.

    Attributes:
        teacher: The teacher.
        student: Makes a student.
        layers: Layers that are matched.
        batches: Inputs of both networks by name, and labels.
    """

    teacher: nn.Module
    student: Callable[[], nn.Module]
    layers: LayerSpec
    batches: list[Batch]


def images(count: int, batch: int, size: int = 64) -> list[Batch]:
    """Images of noise: what a step costs does not depend on what they show."""
    return [({"images": torch.rand(batch, 3, size, size)}, torch.randint(CLASSES, (batch,))) for _ in range(count)]


def resnets(count: int, batch: int = 16) -> Pair:
    """ResNet-50 and ResNet-18 of torchvision, untrained."""
    from torchvision.models import resnet18, resnet50

    return Pair(resnet50().eval(), lambda: resnet18(num_classes=CLASSES), "blocks", images(count, batch))


def lite(count: int, batch: int = 32) -> Pair:
    """EfficientNet-Lite0 with its ImageNet weights, and ResNet-10."""
    return Pair(efficientnet_lite(), lambda: ResNet10(CLASSES), "auto", images(count, batch))


def berts(count: int, batch: int = 32) -> Pair:
    """MiniLM with its weights, and a BERT of two layers; texts of 16 tokens and more, padded to one length."""

    def texts() -> Batch:
        mask = (torch.arange(LENGTH) < torch.randint(16, LENGTH + 1, (batch, 1))).long()
        words = torch.randint(1000, 20000, (batch, LENGTH)) * mask
        return {"input_ids": words, "attention_mask": mask}, torch.randint(CLASSES, (batch,))

    return Pair(sentence_encoder(), lambda: bert(CLASSES, 2, 128, 4), "auto", [texts() for _ in range(count)])


#: What makes a pair with so many batches, and how many, by the names in the table.
PAIRS: dict[str, tuple[Callable[..., Pair], int]] = {
    "EfficientNet-Lite0 → ResNet-10, 32 images of 64 px": (lite, 20),
    f"MiniLM → BERT 2 × 128, 32 texts of {LENGTH} tokens": (berts, 16),
    "ResNet-50 → ResNet-18, 16 images of 64 px": (resnets, 12),
}


class Given(nn.Module):
    """A teacher that costs nothing: its layers give what the real one was read to give for a batch.

    Args:
        readings: For each batch, the readings ``(B, C, *positions)`` of each pair.
    """

    def __init__(self, readings: list[list[Tensor]]) -> None:
        super().__init__()
        self.readings, self.batch = readings, 0
        self.layers = nn.ModuleList(nn.Identity() for _ in readings[0])
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Give them, whatever the inputs are."""
        for layer, reading in zip(self.layers, self.readings[self.batch], strict=True):
            layer(reading)
        return self.anchor


class Training:
    """A student with its optimizer, and perhaps a transfer, whose steps are timed.

    Args:
        pair: The networks.
        transfer: The transfer; None for a plain step.
    """

    def __init__(self, pair: Pair, transfer: RepresentationTransfer | None) -> None:
        torch.manual_seed(0)
        self.student, self.transfer = pair.student(), transfer
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-3)

    def step(self, batch: Batch) -> None:
        """Forward, backward and update."""
        inputs, labels = batch
        loss = functional.cross_entropy(self.student(*inputs.values()), labels)
        if self.transfer is not None:
            loss = loss + self.transfer.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def __enter__(self) -> Training:
        self._stack = ExitStack()
        if self.transfer is not None:
            self._stack.enter_context(self.transfer.attached(self.student))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def silent(text: str) -> None:
    """Say nothing."""


def transfer_of(pair: Pair, cache: Any = None) -> RepresentationTransfer:
    """The transfer of a pair."""
    transfer = RepresentationTransfer(pair.teacher, pair.layers, teacher_cache=cache)
    transfer.report = silent
    return transfer


def floor_of(pair: Pair) -> tuple[RepresentationTransfer, Given]:
    """The same term for readings that are at hand."""
    readings, transfer = [], transfer_of(pair)
    student = pair.student()
    with transfer.attached(student):
        for inputs, _ in pair.batches:
            student(*inputs.values())
            (view,) = transfer.views
            readings.append([view.teacher[number][0] for number in range(len(transfer.pairs))])
            transfer.discard()
    given = Given(readings)
    pairs = [
        LayerPair(each.student, f"layers.{number}", each.weight, (each.axes[0], 1), mask=(each.masks[0], None))
        for number, each in enumerate(transfer.pairs)
    ]
    floor = RepresentationTransfer(given, pairs)
    floor.report = silent
    return floor, given


def renewed(batch: Batch, number: int) -> Batch:
    """The same with other samples: noise is added to images, and the first token of texts is another one."""
    inputs, labels = batch
    name, values = next(iter(inputs.items()))
    if values.is_floating_point():
        return {**inputs, name: values + 1e-3 * (number + 1)}, labels
    values = values.clone()
    values[:, 0] = 20001 + number
    return {**inputs, name: values}, labels


def fill(training: Training, batches: Iterable[Batch]) -> None:
    """Let the cache of a training see batches, without a step."""
    for inputs, _ in batches:
        training.student(*inputs.values())
        training.transfer.discard()
    training.transfer.cache.end_epoch()


def measure_steps(pair: Pair, folder: Path) -> dict[str, Any]:
    """Seconds of each kind of step, round by round, each round with a batch of its own."""
    floor, given = floor_of(pair)
    with Training(pair, transfer_of(pair, folder)) as earlier:
        fill(earlier, pair.batches)
    trainings = {
        PLAIN: Training(pair, None),
        AT_HAND: Training(pair, floor),
        WITHOUT: Training(pair, transfer_of(pair)),
        FIRST: Training(pair, transfer_of(pair, "memory")),
        LATER: Training(pair, transfer_of(pair, "memory")),
        FOLDER: Training(pair, transfer_of(pair, folder)),
    }
    taken: dict[str, list[float]] = {name: [] for name in trainings}
    with ExitStack() as stack:
        for name, training in trainings.items():
            stack.enter_context(training)
            # The first steps trace, check and solve. They see other samples than those that are timed.
            for number in (-3, -2):
                training.step(renewed(pair.batches[0], number))
            if name == LATER:
                fill(training, pair.batches)
            if training.transfer is not None:
                # One call in ten solves, in the same round for all.
                training.transfer.engine.calls = 9
        counts = {name: counted(trainings[name]) for name in CACHED}
        names = list(trainings)
        for number, batch in enumerate(pair.batches):
            given.batch = number
            for name in names[number % len(names) :] + names[: number % len(names)]:
                own = renewed(batch, number) if name == FIRST else batch
                taken[name].append(processor_clock(lambda name=name, own=own: trainings[name].step(own)))
        rates = {}
        for name in CACHED:
            hits, misses = (now - before for now, before in zip(counted(trainings[name]), counts[name], strict=True))
            rates[name] = hits / (hits + misses)
        store = trainings[LATER].transfer.cache.store
        return {"seconds": taken, "hit rates": rates, "bytes per sample": store.bytes / store.samples}


def counted(training: Training) -> tuple[int, int]:
    """Hits and misses so far."""
    return training.transfer.cache.hits, training.transfer.cache.misses


def measure_sweep(pair: Pair, folder: Path, epochs: int) -> dict[str, list[list[float]]]:
    """Seconds of each epoch of whole fits, with an empty folder that they share and without a cache, in turn."""
    taken: dict[str, list[list[float]]] = {"with": [], "without": []}

    def fit(cache: Path | None) -> list[float]:
        ends = [time.process_time()]
        with Training(pair, transfer_of(pair, cache)) as training:
            for _ in range(epochs):
                if cache is not None:
                    training.transfer.cache.start_epoch()
                for batch in pair.batches:
                    training.step(batch)
                if cache is not None:
                    training.transfer.cache.end_epoch()
                ends.append(time.process_time())
        return [end - start for start, end in itertools.pairwise(ends)]

    for number in range(FITS):
        for name in ("with", "without")[:: 1 if number % 2 else -1]:
            taken[name].append(fit(folder if name == "with" else None))
    return taken


def sweep_ratio(sweep: dict[str, list[list[float]]], epochs: int) -> float:
    """Time of fits of so many epochs without a cache, over that with the folder."""
    without, cached = (sum(sum(fit[:epochs]) for fit in sweep[name]) for name in ("without", "with"))
    return without / cached


def judge(found: dict[str, Any], epochs: Sequence[int]) -> list[tuple[str, float, float, bool]]:
    """What was measured beside what is asked for: a name, the number, its limit, and whether it holds.

    Args:
        found: All figures of one pair.
        epochs: Lengths of the fits of the sweep.
    """
    steps, sweep = found["steps"]["seconds"], found["sweep"]
    later, near = ratios(steps, WITHOUT, LATER).median, ratios(steps, LATER, AT_HAND).median
    wholes = [(count, sweep_ratio(sweep, count)) for count in epochs]
    return [
        ("later epochs, times cheaper", later, LATER_LIMIT, later >= LATER_LIMIT),
        ("later epochs over the floor", near, FLOOR_LIMIT, near <= FLOOR_LIMIT),
        *(
            (f"sweep of {FITS} fits of {count} epochs, times cheaper", whole, SWEEP_LIMIT, whole >= SWEEP_LIMIT)
            for count, whole in wholes
        ),
    ]


def report(results: dict[str, Any]) -> str:
    """The page."""
    fits = [f"{count} epochs: without / with" for count in results["epochs"]]
    fits += [f"the first of {count}: with / without" for count in results["epochs"]]
    lines = [
        "# Teacher cache",
        "",
        f"`{results['command']}`, one thread. Processor time, median (quartiles) of interleaved rounds. The floor is "
        "a plain step with the matching, for readings of the teacher that are at hand; no cache can be cheaper. *At "
        "best* is what the floor would save.",
        "",
        f"| pair | {PLAIN}, ms | {AT_HAND}, ms | {WITHOUT}, ms | {FIRST} / {WITHOUT} | {WITHOUT} / {LATER} | "
        f"{WITHOUT} / {FOLDER} | at best | {LATER} / {AT_HAND} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results["pairs"].items():
        steps = found["steps"]["seconds"]
        shown = [f"{1e3 * Quartiles.of(steps[kind]).median:.0f}" for kind in (PLAIN, AT_HAND, WITHOUT)]
        shown += [
            f"{ratios(steps, of, to):.2f}"
            for of, to in (
                (FIRST, WITHOUT),
                (WITHOUT, LATER),
                (WITHOUT, FOLDER),
                (WITHOUT, AT_HAND),
                (LATER, AT_HAND),
            )
        ]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    lines += [
        "",
        f"Samples that were known, bytes of a sample, and {FITS} fits that share a folder, which is empty at first, "
        f"against as many without a cache, by the number of their epochs of {SWEPT} batches:",
        "",
        f"| pair | first epoch | later epochs | from a folder | bytes | {' | '.join(fits)} |",
        f"|---|---|---|---|---|{'---|' * len(fits)}",
    ]
    for name, found in results["pairs"].items():
        rates, sweep = found["steps"]["hit rates"], found["sweep"]
        shown = [f"{rates[kind]:.0%}" for kind in CACHED]
        shown.append(f"{found['steps']['bytes per sample']:.0f}")
        shown += [f"{sweep_ratio(sweep, count):.2f}" for count in results["epochs"]]
        first = {kind: each[:1] for kind, each in sweep.items()}
        shown += [f"{1 / sweep_ratio(first, count):.2f}" for count in results["epochs"]]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    lines += ["", "| pair | what | measured | asked for | |", "|---|---|---|---|---|"]
    for name, found in results["pairs"].items():
        for what, value, limit, passed in judge(found, results["epochs"]):
            sign = "≤" if "over" in what else "≥"
            lines.append(f"| {name} | {what} | {value:.2f} | {sign} {limit} | {'pass' if passed else '**fail**'} |")
    return "\n".join(lines) + "\n"


def measure(make: Callable[..., Pair], count: int, epochs: int, **sizes: int) -> dict[str, Any]:
    """All figures of one pair.

    Args:
        make: Makes the pair.
        count: Batches, and so rounds.
        epochs: Epochs of each fit of the sweep, on the first batches.
        sizes: Of the batches.
    """
    torch.manual_seed(0)
    pair = make(count, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        steps = measure_steps(pair, Path(folder, "steps"))
        swept = replace(pair, batches=pair.batches[:SWEPT])
        return {"steps": steps, "sweep": measure_sweep(swept, Path(folder, "sweep"), epochs)}


def main() -> None:
    """Measure all pairs, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small batches; writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=TransferWarning)
    results: dict[str, Any] = {
        "command": f"python -m benchmarks.teacher_cache{' --quick' if arguments.quick else ''}",
        "epochs": (1,) if arguments.quick else EPOCHS,
        "pairs": {},
    }
    for name, (make, count) in PAIRS.items():
        small = (2, 1, {"batch": 4}) if arguments.quick else (count, max(EPOCHS), {})
        found = results["pairs"][name] = measure(make, *small[:2], **small[2])
        judged = judge(found, results["epochs"])
        print(name, *(f"{what}: {value:.2f}" for what, value, *_ in judged), sep="; ", flush=True)
        if not arguments.quick:
            (RESULTS / "teacher_cache.json").write_text(json.dumps(results, indent=1) + "\n")
            write_page(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
