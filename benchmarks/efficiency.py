"""Does a plan from more data than one batch help, and does a plan that is rarely solved hurt?

A small student from scratch learns lower-case letters from ten labels a class, with a teacher of capitals and digits,
at batch sizes 8 and 16: ``python -m benchmarks.efficiency``. Differences are paired over seeds (images, initial weights
and order of batches are the same), with 95 % intervals. Writes ``results/efficiency.json`` and the page
``results/efficiency.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks.pages import write_page
from examples.glyphs import glyphs
from examples.networks import STUDENT_WIDTHS, TEACHER_WIDTHS, ConvNet
from lightning_otrt import RepresentationTransfer

RESULTS = Path(__file__).parent / "results" / "efficiency.json"
BATCH_SIZES = (8, 16)
BLOCKS = {f"blocks.{block}": f"blocks.{block}" for block in range(3)}
PENULTIMATE: dict[str, Any] = {"layers": "penultimate", "cost": "euclidean"}
METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "penultimate, solved on each batch": {**PENULTIMATE, "memory": 0.0, "solve_every": 1},
    "penultimate, memory 0.98": {**PENULTIMATE, "memory": 0.98},
    "blocks, solve_every 1": {"layers": BLOCKS, "solve_every": 1},
    "blocks, solve_every 10": {"layers": BLOCKS, "solve_every": 10},
    "blocks, solve_every 50": {"layers": BLOCKS, "solve_every": 50},
    "blocks, solve_every 1, memory 0": {"layers": BLOCKS, "solve_every": 1, "memory": 0.0},
    "blocks, solve_every 10, memory 0": {"layers": BLOCKS, "solve_every": 10, "memory": 0.0},
}
#: (one, other): the gain of one over the other is reported.
COMPARISONS = (
    ("penultimate, memory 0.98", "penultimate, solved on each batch"),
    ("blocks, solve_every 10", "blocks, solve_every 1"),
    ("blocks, solve_every 50", "blocks, solve_every 1"),
    ("blocks, solve_every 1", "blocks, solve_every 1, memory 0"),
    ("blocks, solve_every 10, memory 0", "blocks, solve_every 1, memory 0"),
    ("blocks, solve_every 10", "blocks, solve_every 10, memory 0"),
)


def train(
    net: ConvNet,
    data: TensorDataset,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    transfer: RepresentationTransfer | None = None,
    lr: float = 3e-2,
    weight_decay: float = 1.0,
) -> ConvNet:
    """Train in place with AdamW and a one-cycle learning rate."""
    images, labels = data.tensors
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    order = torch.empty(0, dtype=torch.long)
    net.train()
    if transfer is not None:
        transfer.attach(net)
    try:
        for _ in range(steps):
            if len(order) < batch_size:
                order = torch.randperm(len(labels), generator=generator)
            batch, order = order[:batch_size], order[batch_size:]
            if transfer is None:
                loss = F.cross_entropy(net(images[batch]), labels[batch])
            else:
                with transfer.recording():
                    loss = F.cross_entropy(net(images[batch]), labels[batch])
                loss = loss + transfer.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    finally:
        if transfer is not None:
            transfer.detach()
    return net.eval()


@torch.no_grad()
def accuracy(net: ConvNet, data: TensorDataset) -> float:
    """Accuracy in percent."""
    images, labels = data.tensors
    hits = sum(int((net(x).argmax(1) == y).sum()) for x, y in zip(images.split(512), labels.split(512), strict=True))
    return 100 * hits / len(labels)


def build(widths: tuple[int, ...], data: TensorDataset, seed: int) -> ConvNet:
    """A network with the initial weights of a seed."""
    torch.manual_seed(seed)
    return ConvNet(widths, int(data.tensors[1].max()) + 1)


def run(seeds: int, steps: int, teacher_steps: int) -> dict[str, dict[str, list[float]]]:
    """Test accuracies by batch size, method and seed."""
    source, test = glyphs("source", "train"), glyphs("lowercase", "test")
    teacher = train(build(TEACHER_WIDTHS, source, 0), source, steps=teacher_steps, batch_size=64, seed=0)
    found: dict[str, dict[str, list[float]]] = {f"{size}": {name: [] for name in METHODS} for size in BATCH_SIZES}
    for seed in range(1, seeds + 1):
        few = glyphs("lowercase", "train", per_class=10, seed=seed)
        for size in BATCH_SIZES:
            for name, options in METHODS.items():
                transfer = None if options is None else RepresentationTransfer(teacher, **options)
                student = build(STUDENT_WIDTHS, few, seed)
                train(student, few, steps=steps * 16 // size, batch_size=size, seed=seed, transfer=transfer)
                found[f"{size}"][name].append(accuracy(student, test))
                print(f"seed {seed}, batch {size}, {name}: {found[f'{size}'][name][-1]:.1f} %", flush=True)
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    if len(values) < 2:
        return values[0], math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(stats.t.ppf(0.975, len(values) - 1)) * spread


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """The results as Markdown."""
    lines = ["| batch | method | test accuracy, % |", "|---|---|---|"]
    for size, methods in found.items():
        lines += ["| {} | {} | {:.1f} ± {:.1f} |".format(size, name, *interval(v)) for name, v in methods.items()]
    lines += ["", "| batch | paired difference | points |", "|---|---|---|"]
    for size, methods in found.items():
        for one, other in COMPARISONS:
            gains = [a - b for a, b in zip(methods[one], methods[other], strict=True)]
            lines.append("| {} | {} against {} | {:+.1f} ± {:.1f} |".format(size, one, other, *interval(gains)))
    return "\n".join(lines)


def report(options: argparse.Namespace, found: dict[str, dict[str, list[float]]]) -> str:
    """The page of results."""
    return "\n".join(
        [
            "# Efficiency",
            "",
            f"`python -m benchmarks.efficiency`: lower-case letters, ten labels a class, students from scratch with a "
            f"teacher of capitals and digits; {options.seeds} paired seeds, {options.steps} steps of 16 images, twice "
            'as many of 8; mean and 95 % interval. Where nothing else is said `memory` is `"auto"`, `solve_every` 10.',
            "",
            table(found),
            "",
        ]
    )


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="number of paired runs")
    parser.add_argument("--steps", type=int, default=800, help="steps at batch size 16; 8 takes twice as many")
    parser.add_argument("--teacher-steps", type=int, default=800)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = run(options.seeds, options.steps, options.teacher_steps)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"settings": vars(options), "accuracy": found}, indent=1) + "\n")
    write_page(report(options, found))
    print(table(found))


if __name__ == "__main__":
    main()
