"""What do fixed views of augmented images cost in accuracy?

A small student from scratch learns new letters from ten labels a class, with a teacher of capitals and digits, and
images that are turned, moved and scaled at random: without end, or in 32 or 8 fixed views of each image, or not at all:
``python -m benchmarks.fixed_views``. Images, initial weights and order of batches are the same for all. Writes
``results/fixed_views.json`` and the page ``results/fixed_views.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

from benchmarks.efficiency import BLOCKS, accuracy, build, train
from benchmarks.pages import write_page
from examples.glyphs import glyphs
from examples.networks import STUDENT_WIDTHS, TEACHER_WIDTHS, ConvNet
from lightning_otrt import FixedViews, RepresentationTransfer

RESULTS = Path(__file__).parent / "results" / "fixed_views.json"
TARGETS = ("greek", "lowercase")
#: Views of each image by name; None: another one each time, 0: the image as it is.
VIEWS: dict[str, int | None] = {"endless": None, "32 views": 32, "8 views": 8, "no augmentation": 0}
METHODS: dict[str, dict[str, Any] | None] = {"plain": None, "transport": {"layers": BLOCKS}}
BATCH_SIZE = 64
#: What suits plain training on ten labels a class best (section "Transfer").
OPTIMIZER = {"lr": 1.0, "weight_decay": 0.03}

#: Accuracies of the seeds by target, method and views.
Found = dict[str, dict[str, dict[str, list[float]]]]


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images that are turned, moved and scaled at random.

    Args:
        data: Images and labels.
    """

    def __init__(self, data: TensorDataset) -> None:
        self.images, self.labels = data.tensors
        self.change = v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.85, 1.15))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image and its label."""
        return self.change(self.images[index]), self.labels[index]


def batches(data: TensorDataset, views: int | None, seed: int) -> Iterator[list[Tensor]]:
    """Batches without end, in an order that the seed decides alone."""
    dataset: Dataset[Any] = data if views == 0 else Augmented(data)
    if views:
        dataset = FixedViews(dataset, views, seed)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, drop_last=True, generator=order)
    while True:
        yield from loader


def fit(
    student: ConvNet, data: Iterator[list[Tensor]], *, steps: int, transfer: RepresentationTransfer | None
) -> ConvNet:
    """Train in place with AdamW and a one-cycle learning rate."""
    optimizer = torch.optim.AdamW(student.parameters(), **OPTIMIZER)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, OPTIMIZER["lr"], total_steps=steps)
    student.train()
    if transfer is not None:
        transfer.attach(student)
    for _ in range(steps):
        images, labels = next(data)
        if transfer is None:
            loss = F.cross_entropy(student(images), labels)
        else:
            with transfer.recording():
                loss = F.cross_entropy(student(images), labels)
            loss = loss + transfer.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if transfer is not None:
        transfer.detach()
    return student.eval()


def run(*, seeds: int, steps: int, teacher_steps: int) -> Found:
    """Test accuracies."""
    source = glyphs("source", "train")
    settings = {"steps": teacher_steps, "batch_size": BATCH_SIZE, "seed": 0, "lr": 1e-2, "weight_decay": 1e-2}
    teacher = train(build(TEACHER_WIDTHS, source, 0), source, **settings)
    found: Found = {}
    for target in TARGETS:
        test = glyphs(target, "test")
        found[target] = {method: {name: [] for name in VIEWS} for method in METHODS}
        for seed in range(1, seeds + 1):
            few = glyphs(target, "train", per_class=10, seed=seed)
            for method, options in METHODS.items():
                for name, views in VIEWS.items():
                    transfer = None if options is None else RepresentationTransfer(teacher, **options)
                    student = build(STUDENT_WIDTHS, few, seed)
                    torch.manual_seed(seed)
                    fit(student, batches(few, views, seed), steps=steps, transfer=transfer)
                    found[target][method][name].append(accuracy(student, test))
                    print(f"{target}, seed {seed}, {method}, {name}: {found[target][method][name][-1]:.1f}", flush=True)
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval, by Student's t."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


def section(found: Found, settings: dict[str, int]) -> str:
    """The page of results."""
    lines = [
        "# Fixed views",
        "",
        f"`python -m benchmarks.fixed_views`: test accuracy in percent of students with half of the teacher's "
        f"channels, ten labels a class, {settings['steps']} steps of {BATCH_SIZE} images, mean of {settings['seeds']} "
        "seeds. Images are turned by up to 10°, moved by 10 % and scaled by 15 % at random: without end, or in fixed "
        "views (`FixedViews`), which come again.",
        "",
        f"| letters | method | {' | '.join(VIEWS)} |",
        "|---" * (len(VIEWS) + 2) + "|",
    ]
    for target, methods in found.items():
        for method, views in methods.items():
            values = [f"{statistics.mean(views[name]):.1f}" for name in VIEWS]
            lines.append(f"| {target} | {method} | {' | '.join(values)} |")
    lines += [
        "",
        "Points lost against augmentation without end, with 95 % intervals over seeds and letters, paired:",
        "",
    ]
    others = [name for name in VIEWS if name != "endless"]
    lines += [f"| method | {' | '.join(others)} |", "|---" * (len(others) + 1) + "|"]
    for method in METHODS:
        lost = []
        for name in others:
            pairs = [zip(methods[method]["endless"], methods[method][name], strict=True) for methods in found.values()]
            mean, half = interval([a - b for pair in pairs for a, b in pair])
            lost.append(f"{mean:.1f} ± {half:.1f}")
        lines.append(f"| {method} | {' | '.join(lost)} |")
    return "\n".join(lines)


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of students of each kind")
    parser.add_argument("--steps", type=int, default=400, help="steps of a student")
    parser.add_argument("--teacher-steps", type=int, default=800)
    settings = vars(parser.parse_args())
    torch.set_num_threads(1)
    found = run(**settings)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"settings": settings, "found": found}, indent=1) + "\n")
    text = section(found, settings)
    write_page(text)
    print(text)


if __name__ == "__main__":
    main()
