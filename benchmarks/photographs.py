"""The settings of the paper on photographs that lie on disk: ``python -m benchmarks.photographs --data DIR``.

Data sets are those of torchvision, on disk already; teachers are torchvision's networks with its ImageNet weights.
Fine-tuning follows L2-SP (Li et al., arXiv 1802.01483): SGD with momentum 0.9, batches of 64, 9,000 steps, a learning
rate that falls to a tenth after two thirds of them. Each run is a line of ``results/photographs.jsonl``; the command
continues where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import models

from benchmarks.evidence import losses, real_data
from benchmarks.evidence.networks import tapped
from benchmarks.evidence.runs import Results, Row, Run, complete
from benchmarks.evidence.statistics import compare, estimate
from lightning_otrt import RepresentationTransfer

RESULTS = Path(__file__).parent / "results" / "photographs.jsonl"
#: Names of the linear heads.
HEADS = {"resnet18": "fc", "resnet50": "fc", "resnet101": "fc", "mobilenet_v2": "classifier.1"}


@dataclass(frozen=True)
class Recipe:
    """A method: its weight, and what makes its term.

    Attributes:
        weight: Weight of the term.
        transfer: Options of :class:`RepresentationTransfer`.
        loss: Loss of a rival.
        l2_sp: Penalise the distance to the starting point.
    """

    weight: float = 0.0
    transfer: Mapping[str, Any] | None = None
    loss: Any = None
    l2_sp: bool = False


METHODS = {
    "plain": Recipe(),
    "l2-sp": Recipe(0.1, l2_sp=True),
    "kd": Recipe(1.0, loss=losses.SoftTargets),
    "lwf": Recipe(1.0, loss=losses.LearningWithoutForgetting),
    "fitnets": Recipe(4.0, loss=losses.HintPenultimate),
    "random": Recipe(8.0, {"layers": "blocks", "plan": "random"}),
    "ot-penultimate": Recipe(8.0, {"layers": "penultimate", "cost": "euclidean"}),
    "ot-blocks": Recipe(8.0, {"layers": "blocks"}),
}
#: Methods of each setting: L2-SP needs a starting point, KD on logits the same classes.
DEFINED = {
    "1": [name for name in METHODS if name != "kd"],
    "1x": [name for name in METHODS if name != "kd"],
    "2": [name for name in METHODS if name not in ("l2-sp", "lwf")],
    "3": [name for name in METHODS if name not in ("l2-sp", "kd")],
}


@dataclass(frozen=True)
class Places:
    """What a run needs beside its settings.

    Attributes:
        data: Folder of the data sets.
        size: Side of the images.
        workers: Processes that read images.
        pretrained: Whether networks have torchvision's weights; False is for tests of the path alone.
    """

    data: Path
    size: int = 224
    workers: int = 4
    pretrained: bool = True


def execute(run: Run, places: Places) -> Row:
    """Train and test the student of a run; ``run.pair`` is ``teacher -> student``."""
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = real_data.load(run.target, places.data, split="train", transform=real_data.training_transform(places.size))
    if run.per_class:
        train = real_data.few(train, run.per_class, run.seed)
    teacher = teacher_of(run, places).to(device)
    student = new_student(run, places).to(device)
    fit(run, places, student, teacher, train, device)
    test = real_data.load(run.target, places.data, split="test", transform=real_data.held_out_transform(places.size))
    accuracy = evaluate(student, DataLoader(test, run.batch_size, num_workers=places.workers), device)
    return {"accuracy": round(accuracy, 3), "seconds": round(time.perf_counter() - start, 1)}


def build(name: str, num_classes: int | None, *, pretrained: bool) -> nn.Module:
    """A network of torchvision, with a new head where ``num_classes`` is given."""
    net: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None)
    if num_classes is not None:
        parent, _, last = HEADS[name].rpartition(".")
        old = net.get_submodule(HEADS[name])
        setattr(net.get_submodule(parent), last, nn.Linear(old.in_features, num_classes))
    return net


@functools.lru_cache(maxsize=2)
def _tuned_teacher(target: str, name: str, steps: int, batch_size: int, places: Places) -> nn.Module:
    """The teacher of compression: the ImageNet network after plain fine-tuning on the task."""
    run = Run("1", target, "plain", 0.01, 1e-4, 0.0, 0, pair=f"{name} -> {name}", steps=steps, batch_size=batch_size)
    torch.manual_seed(0)
    net = build(name, real_data.SOURCES[target].num_classes, pretrained=places.pretrained)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = real_data.load(target, places.data, split="train", transform=real_data.training_transform(places.size))
    fit(run, places, net.to(device), None, train, device)
    return net.eval()


def teacher_of(run: Run, places: Places) -> nn.Module:
    """ImageNet's network, or for compression one that was fine-tuned on the task."""
    name = run.pair.partition(" -> ")[0]
    if run.setting == "2":
        return _tuned_teacher(run.target, name, run.steps, run.batch_size, places)
    return build(name, None, pretrained=places.pretrained).eval()


def new_student(run: Run, places: Places) -> nn.Module:
    """From ImageNet's weights in settings 1 and 1x, else from scratch."""
    torch.manual_seed(run.seed)
    name = run.pair.partition(" -> ")[2]
    pretrained = places.pretrained and run.setting in ("1", "1x")
    return build(name, real_data.SOURCES[run.target].num_classes, pretrained=pretrained)


def fit(
    run: Run,
    places: Places,
    student: nn.Module,
    teacher: nn.Module | None,
    train: real_data.Photographs,
    device: torch.device,
) -> None:
    """Train in place."""
    recipe = METHODS[run.method]
    teacher_name, _, student_name = run.pair.partition(" -> ")
    with ExitStack() as stack:
        transfer = None
        if recipe.transfer is not None:
            transfer = RepresentationTransfer(teacher, weight=run.weight, seed=run.seed, **recipe.transfer)
            stack.enter_context(transfer.attached(student))
        parameters: list[nn.Parameter] = list(student.parameters())
        loss = None
        if recipe.loss is not None:
            assert teacher is not None
            mine = stack.enter_context(tapped(student, (), 1, HEADS[student_name]))
            theirs = stack.enter_context(tapped(teacher, (), 1, HEADS[teacher_name]))
            with torch.no_grad():
                image = torch.zeros(2, 3, places.size, places.size, device=device)
                teacher(image), student.eval()(image)
            loss = recipe.loss(mine.take(), theirs.take()).to(device)
            parameters += list(loss.parameters())
        start = {
            name: value.detach().clone()
            for name, value in student.named_parameters()
            if recipe.l2_sp and not name.startswith(HEADS[student_name])
        }
        optimizer = torch.optim.SGD(parameters, lr=run.lr, momentum=0.9, weight_decay=run.weight_decay)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2 * run.steps // 3])
        student.train()
        for images, labels in batches(train, run, places, device):
            logits = student(images)
            value = F.cross_entropy(logits, labels)
            if transfer is not None:
                value = value + transfer.loss()
            if loss is not None and teacher is not None:
                with torch.no_grad():
                    teacher(images)
                value = value + run.weight * loss(mine.take(), theirs.take())
            if start:
                value = value + run.weight * losses.l2_sp(dict(student.named_parameters()), start)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()


def batches(
    train: real_data.Photographs, run: Run, places: Places, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """So many batches as the run has steps, in the order of its seed."""
    generator = torch.Generator().manual_seed(run.seed)
    loader = DataLoader(
        train, run.batch_size, shuffle=True, drop_last=True, num_workers=places.workers, generator=generator
    )
    if not len(loader):
        raise ValueError(f"{run.target} has fewer images than a batch of {run.batch_size}; choose a smaller batch.")
    done = 0
    while True:
        for images, labels in loader:
            if done == run.steps:
                return
            yield images.to(device), labels.to(device)
            done += 1


@torch.no_grad()
def evaluate(net: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Accuracy in percent."""
    net.eval()
    hits = count = 0
    for images, labels in loader:
        hits += int((net(images.to(device)).argmax(1).cpu() == labels).sum())
        count += len(labels)
    return 100 * hits / count


def table(runs: Sequence[Run], results: Results) -> str:
    """Accuracies, and what the default gains on each method, by data set and setting."""
    lines = ["| data | setting | method | accuracy, % | OT, blocks gains | p (Holm) |", "|---|---|---|---|---|---|"]
    for target, setting in dict.fromkeys((run.target, run.setting) for run in runs):
        found: dict[str, dict[int, float]] = {}
        for run in runs:
            if (run.target, run.setting) == (target, setting) and run in results:
                found.setdefault(run.method, {})[run.seed] = results[run]["accuracy"]
        others = {name: values for name, values in found.items() if name != "ot-blocks"}
        comparisons = compare(found.get("ot-blocks", {}), others)
        for name, values in found.items():
            one = comparisons.get(name)
            gain = "" if one is None else f"{one.gain.mean:+.1f} ± {one.gain.half_width:.1f} | {one.corrected:.3f}"
            mean = estimate(list(values.values()))
            lines.append(f"| {target} | {setting} | {name} | {mean} | {gain or ' | '} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of torchvision's data sets")
    parser.add_argument("--sets", nargs="+", choices=real_data.SOURCES, default=list(real_data.SOURCES))
    parser.add_argument("--settings", nargs="+", choices=DEFINED, default=list(DEFINED))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--teacher", choices=HEADS, default="resnet101")
    parser.add_argument("--student", choices=HEADS, default="mobilenet_v2", help="of settings 1x, 2 and 3")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--per-class", type=int, default=0, help="labelled images of each class; 0: all")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--no-weights", action="store_true", help="untrained networks, to try the path alone")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    places = Places(options.data, options.size, options.workers, not options.no_weights)
    runs = [
        Run(
            setting=setting,
            target=target,
            method=method,
            lr=options.lr,
            weight_decay=options.weight_decay,
            weight=METHODS[method].weight,
            seed=seed,
            per_class=options.per_class,
            pair=f"{options.teacher} -> {options.teacher if setting == '1' else options.student}",
            steps=options.steps,
            batch_size=options.batch_size,
        )
        for target in options.sets
        for setting in options.settings
        for seed in range(options.seeds)
        for method in DEFINED[setting]
        if method in options.methods
    ]
    results = Results(options.results)
    complete(runs, results, partial(execute, places=places), title="photographs")
    print(table(runs, results))


if __name__ == "__main__":
    main()
