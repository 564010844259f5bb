"""One run: a teacher, a student, a method, and the accuracy that comes out."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.evidence import data
from benchmarks.evidence.losses import HintBlocks, WithHints, l2_sp
from benchmarks.evidence.methods import COPIED, METHODS, Method
from benchmarks.evidence.networks import PAIRS, CachedTeacher, Features, Pair, tapped
from benchmarks.evidence.runs import Row, Run
from lightning_otrt import LayerPair, RepresentationTransfer

#: Trained teachers are kept here between processes; the folder can be deleted at any time.
CACHE = Path(__file__).parents[2] / "outputs" / "evidence"
#: Seeds of networks that a student of setting 1x starts from: never those of a teacher.
ANOTHER = 500
#: Steps after which plans are kept, as shares of a run.
_PLAN_SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 1.0)


def execute(run: Run) -> Row:
    """Train and evaluate the student of a run.

    Returns:
        ``accuracy`` in percent, ``seconds``, and ``plans`` where the run asks for them.
    """
    torch.set_num_threads(1)
    start = time.perf_counter()
    few = data.labelled(run.target, run.per_class, run.seed)
    student, found = train_student(run, few)
    accuracy = evaluate(student, data.held_out(run.target, run.split))
    return {"accuracy": round(accuracy, 3), "seconds": round(time.perf_counter() - start, 2), **found}


def source_of(run: Run) -> str:
    """The task of a run's teacher."""
    return run.source or (run.target if run.setting == "2" else "source")


@functools.lru_cache(maxsize=6)
def teacher_of(task: str, pair: str, seed: int, steps: int) -> nn.Module:
    """A trained teacher, from the cache where it is there."""
    images = data.everything(task)
    torch.manual_seed(seed)
    net = PAIRS[pair].teacher(images.num_classes)
    name = hashlib.sha256(f"{task} {seed} {steps} {net}".encode()).hexdigest()[:16]
    path = CACHE / f"teacher-{name}.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    fit_plain(net, images, steps=steps, seed=seed, lr=PAIRS[pair].teacher_lr, weight_decay=1e-2)
    CACHE.mkdir(parents=True, exist_ok=True)
    # Renamed when whole: several processes may train the same teacher at once.
    whole = path.with_suffix(f".{os.getpid()}")
    torch.save(net.state_dict(), whole)
    whole.replace(path)
    return net.eval()


def new_student(run: Run, num_classes: int) -> nn.Module:
    """The student before training: the same for all methods of a seed."""
    pair = PAIRS[run.pair]
    torch.manual_seed(run.seed)
    if run.setting not in COPIED:
        return pair.student(num_classes)
    student = pair.teacher(num_classes)
    seed = run.teacher_seed + (ANOTHER if run.setting == "1x" else 0)
    start = teacher_of(source_of(run), run.pair, seed, run.teacher_steps).state_dict()
    student.load_state_dict(
        {name: value for name, value in start.items() if not name.startswith("head.")}, strict=False
    )
    return student


def layers_of(wanted: Any, pair: Pair) -> list[LayerPair]:
    """Pairs of student layers and those of the cached teacher.

    Args:
        wanted: ``"blocks"``, ``"later blocks"``, ``"penultimate"``, indices of blocks, or a sequence of these.
        pair: The architectures.
    """
    if isinstance(wanted, (list, tuple)):
        return [layer for part in wanted for layer in layers_of(part, pair)]
    if wanted == "penultimate":
        return [LayerPair("head:input", "penultimate", neuron_axis=1)]
    count = len(pair.layers)
    indices = {"blocks": range(count), "later blocks": range(1, count)}.get(wanted, [wanted])
    return [LayerPair(pair.layers[i][0], f"layers.{i}", neuron_axis=(pair.neuron_axis, 1)) for i in indices]


@dataclass
class Batches:
    """Batches of indices, in the same order for all methods of a seed.

    Args:
        count: Number of images.
        size: Images of a batch; all, where there are fewer.
        seed: Decides the order.
    """

    count: int
    size: int
    seed: int

    def __post_init__(self) -> None:
        """Start with an empty epoch."""
        self.size = min(self.size, self.count)
        self._generator = torch.Generator().manual_seed(self.seed)
        self._order = torch.empty(0, dtype=torch.long)

    def next(self) -> Tensor:
        """The next batch; an epoch leaves out what does not fill one."""
        if len(self._order) < self.size:
            self._order = torch.randperm(self.count, generator=self._generator)
        batch, self._order = self._order[: self.size], self._order[self.size :]
        return batch


class Transport:
    """The transport term of the library for a cached teacher, which looks up the images of the current batch.

    Args:
        teacher: The cached teacher.
        pair: The architectures.
        options: Options of :class:`RepresentationTransfer`, with its weight.
    """

    def __init__(self, teacher: CachedTeacher, pair: Pair, options: Mapping[str, Any]) -> None:
        options = dict(options)
        self.indices = torch.empty(0, dtype=torch.long)
        self.transfer = RepresentationTransfer(
            teacher, layers_of(options.pop("layers"), pair), teacher_inputs=lambda images: self.indices, **options
        )


def train_student(run: Run, few: data.Images) -> tuple[nn.Module, Row]:
    """A student after training, and what was recorded on the way."""
    method, pair = METHODS[run.method], PAIRS[run.pair]
    unlabelled = data.pool(run.target) if run.pool and method.uses_teacher else few.images[:0]
    student = new_student(run, few.num_classes)
    if not method.uses_teacher:
        prepare = _start_penalty(student, run.weight) if method.l2_sp else None
        if method.freeze:
            student.requires_grad_(False).get_submodule("head").requires_grad_(True)
        fit_plain(
            student,
            few,
            steps=run.steps,
            seed=run.seed,
            lr=run.lr,
            weight_decay=run.weight_decay,
            batch_size=run.batch_size,
            penalty=prepare,
            body_in_training=not method.freeze,
        )
        return student.eval(), {}
    net = teacher_of(source_of(run), run.pair, run.teacher_seed, run.teacher_steps)
    images = torch.cat([few.images, unlabelled]).contiguous(memory_format=torch.channels_last)
    teacher = CachedTeacher(net, pair, images)
    return student, _fit_with_teacher(run, method, pair, student, teacher, images, few.labels)


def _fit_with_teacher(
    run: Run, method: Method, pair: Pair, student: nn.Module, teacher: CachedTeacher, images: Tensor, labels: Tensor
) -> Row:
    """Train in place by the labels and the terms of a method; the term runs on the pool where there is one."""
    names = [name for name, _ in pair.layers]
    plans: Row = {}
    transport = None
    if method.transfer is not None:
        if method.distillation:
            weight = {"distillation": run.weight}
        else:
            weight = {} if "weight" in method.transfer else {"weight": run.weight}
        options = {**method.transfer, **weight, "seed": run.seed, **dict(run.options)}
        transport = Transport(teacher, pair, options)
        transport.transfer.attach(student)
    with tapped(student, names, pair.neuron_axis) as taps:
        loss = None if method.loss is None else _make_loss(method, student, taps.take, teacher, images, run)
        optimizer, schedule = make_optimizer(
            student.parameters(), run.lr, run.weight_decay, run.steps, [] if loss is None else loss.parameters()
        )
        batches = Batches(len(labels), run.batch_size, run.seed)
        pool = Batches(len(images) - len(labels), run.batch_size, run.seed) if len(images) > len(labels) else None
        student.train()
        for step in range(run.steps):
            indices = batches.next()
            term: Tensor | float = 0.0
            value: Tensor | None = None
            if pool is not None:
                value = F.cross_entropy(student(images[indices]), labels[indices])
                seen = len(labels) + pool.next()
            else:
                seen = indices
            if transport is not None:
                transport.indices = seen
                with transport.transfer.recording():
                    logits = student(images[seen])
                term = transport.transfer.loss()
            else:
                logits = student(images[seen])
            if loss is not None:
                term = term + run.weight * loss(taps.take(), teacher.features(seen))
            if value is None:
                value = F.cross_entropy(logits, labels[indices])
            optimizer.zero_grad()
            (value + term).backward()
            optimizer.step()
            schedule.step()
            if run.keep_plans and transport is not None and _keeps(step, run.steps):
                plans[str(step + 1)] = _plans(transport.transfer)
    if transport is not None:
        transport.transfer.detach()
    student.eval()
    return {"plans": plans} if plans else {}


def _make_loss(
    method: Method, student: nn.Module, take: Any, teacher: CachedTeacher, images: Tensor, run: Run
) -> nn.Module:
    """The loss of a rival, with initial projections of the seed; hints are weighed relative to the loss."""
    assert method.loss is not None
    with torch.no_grad():
        student.eval()(images[:2])
    shapes: Features = take()
    torch.manual_seed(run.seed)
    targets = teacher.features(torch.arange(2))
    loss = method.loss(shapes, targets)
    if not method.hints:
        return loss
    return WithHints(loss, HintBlocks(shapes, targets, grid=4), method.hints / run.weight)


def fit_plain(
    net: nn.Module,
    few: data.Images,
    *,
    steps: int,
    seed: int,
    lr: float,
    weight_decay: float,
    batch_size: int = 64,
    penalty: Any = None,
    body_in_training: bool = True,
) -> None:
    """Train in place by cross-entropy, and by a penalty on the parameters where there is one."""
    optimizer, schedule = make_optimizer(net.parameters(), lr, weight_decay, steps)
    batches = Batches(len(few.labels), batch_size, seed)
    net.train(body_in_training)
    for _ in range(steps):
        indices = batches.next()
        loss = F.cross_entropy(net(few.images[indices]), few.labels[indices])
        if penalty is not None:
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()


def _start_penalty(student: nn.Module, weight: float) -> Any:
    parameters = dict(student.named_parameters())
    start = {name: value.detach().clone() for name, value in parameters.items() if not name.startswith("head.")}
    return lambda: weight * l2_sp(parameters, start)


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    steps: int,
    projections: Iterable[nn.Parameter] = (),
) -> tuple[Any, Any]:
    """AdamW with a one-cycle learning rate, as in the examples.

    The projections of rivals decay less than the student and learn no faster than at 0.3: what suits a student with few
    labels, a strong decay or a very large learning rate, would keep them from fitting or blow them up.
    """
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p.requires_grad]}]
    if others := list(projections):
        groups.append({"params": others, "weight_decay": 1e-2, "lr": min(lr, 0.3)})
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
    highest = [group["lr"] for group in optimizer.param_groups]
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=steps)


@torch.no_grad()
def evaluate(net: nn.Module, held_out: data.Images) -> float:
    """Accuracy in percent."""
    net.eval()
    chunks = zip(held_out.images.split(500), held_out.labels.split(500), strict=True)
    hits = sum(int((net(images).argmax(1) == labels).sum()) for images, labels in chunks)
    return 100 * hits / len(held_out.labels)


def _keeps(step: int, steps: int) -> bool:
    return step in {min(steps - 1, int(share * steps)) for share in _PLAN_SHARES}


def _plans(transfer: RepresentationTransfer) -> Row:
    """The share of mass off the identity in each layer, where widths agree, and the plan of the first layer."""
    found: Row = {}
    for distance in transfer.distances:
        if distance.matrix is None or distance.is_skipped:
            continue
        plan = distance.matrix / distance.matrix.sum()
        layer: Row = {"value": round(float(distance.value), 4)}
        if plan.shape[0] == plan.shape[1]:
            layer["off_identity"] = round(1 - float(plan.diagonal().sum()), 4)
        if distance is transfer.distances[0]:
            layer["plan"] = [[round(entry, 4) for entry in row] for row in (plan * plan.shape[0]).tolist()]
        found[distance.name] = layer
    return found
