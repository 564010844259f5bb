"""One run: a student, a method, and the accuracy and cost that come out."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.evidence.losses import AttentionTransfer, l2_sp, pooled
from benchmarks.evidence.methods import Method
from benchmarks.evidence.networks import Features
from benchmarks.evidence.runs import Row, Run
from benchmarks.evidence.training import Batches, make_optimizer
from benchmarks.real.checkpoints import efficientnet_lite
from benchmarks.real.data import Batch, Problem, Samples, problem_of, texts_of
from benchmarks.real.methods import METHODS
from benchmarks.real.networks import ResNet10, bert, mobilenet, sentence_encoder
from benchmarks.real.recorded import Recorded, Replay, Taps, default_pairs
from lightning_otrt import RepresentationTransfer

TEACHERS: dict[str, Callable[[], nn.Module]] = {
    "EfficientNet-Lite0": efficientnet_lite,
    "EfficientNet-Lite2": lambda: efficientnet_lite(2),
    "MiniLM": sentence_encoder,
}
STUDENTS: dict[str, Callable[[int], nn.Module]] = {
    "ResNet-10": ResNet10,
    "MobileNetV2 0.35": mobilenet,
    "BERT 2 × 128": lambda classes: bert(classes, 2, 128, 4),
    "BERT 3 × 192": lambda classes: bert(classes, 3, 192, 6),
    "itself": lambda classes: efficientnet_lite(num_classes=classes),
}
#: Option of a run: the teacher's layer for each pair that the default chooses; "" leaves the pair out. Others are those
#: of the transfer.
TEACHER_LAYERS = "teacher_layers"
#: Layer of each teacher whose output a linear head reads.
FEATURES = {"EfficientNet-Lite0": "global_pool", "EfficientNet-Lite2": "global_pool", "MiniLM": "head"}


def execute(run: Run, device: str = "cpu") -> Row:
    """Train and evaluate the student of a run.

    Args:
        run: What to run.
        device: Where teacher and student are.

    Returns:
        ``accuracy`` in percent, ``seconds`` of the whole run, the ``layers`` that were compared, and of texts a hash.
        On a CPU ``step_ms``, processor time of a training step with the teacher's outputs at hand; else the ``device``.
    """
    torch.set_num_threads(1)
    start = time.perf_counter()
    device = str(torch.empty(0, device=device).device)  # with its number
    method, problem = METHODS[run.method], problem_of(run, device)
    if method.freeze:
        found: Row = {"accuracy": ridge_accuracy(run, problem)}
    else:
        student = new_student(run, problem.num_classes, device)
        found = fit(run, method, student, problem.train)
        found = {"accuracy": accuracy(student, problem.held_out), **found}
    if device != "cpu":
        found.pop("step_ms", None)  # several processes share the device, so that the time of one says little
        found["device"] = f"{torch.cuda.get_device_name(device)}, torch {torch.__version__.partition('+')[0]}"
    if texts := texts_of(run.target):
        found["texts"] = texts
    return {**found, "accuracy": round(found["accuracy"], 3), "seconds": round(time.perf_counter() - start, 2)}


@functools.cache
def teacher_of(name: str, device: str = "cpu") -> nn.Module:
    """A frozen teacher in evaluation mode."""
    return TEACHERS[name]().eval().to(device, memory_format=torch.channels_last)


def names_of(run: Run) -> tuple[str, str]:
    """Names of teacher and student."""
    teacher, _, student = run.pair.partition(" -> ")
    return teacher, student


def new_student(run: Run, num_classes: int, device: str = "cpu") -> nn.Module:
    """The student before training: the same for all methods of a seed, on every device."""
    torch.manual_seed(run.seed)
    return STUDENTS[names_of(run)[1]](num_classes).to(device, memory_format=torch.channels_last)


def recorded_of(run: Run, device: str = "cpu") -> Recorded:
    """What the teacher of a run computes on its training samples, at the layers that it names, or of the default."""
    return _recorded(replace(run, method="", lr=0.0, weight_decay=0.0, weight=0.0, steps=0), device)


@functools.lru_cache(maxsize=1)
def _recorded(run: Run, device: str) -> Recorded:
    problem, teacher = problem_of(run, device), teacher_of(names_of(run)[0], device)
    pairs = default_pairs(new_student(run, problem.num_classes, device), teacher, problem.train)
    if names := dict(run.options).get(TEACHER_LAYERS):
        pairs = tuple(replace(pair, teacher=name) for pair, name in zip(pairs, names, strict=True) if name)
    return Recorded.of(teacher, pairs, problem.train)


class Rival(nn.Module):
    """The loss of another method on the layers that the default compares.

    Args:
        method: The method.
        recorded: The teacher's outputs.
        taps: Those of the student.
    """

    def __init__(self, method: Method, recorded: Recorded, taps: Taps) -> None:
        super().__init__()
        assert method.loss is not None
        self._make = method.loss
        self._recorded, self._taps = recorded, taps
        self._sees_maps = method.loss is AttentionTransfer
        self.loss: nn.Module = nn.Identity()

    def features(self, batch: Batch, indices: Tensor, logits: Tensor) -> tuple[Features, ...]:
        """Representations of student and teacher on a batch, at as many positions as the smaller map has."""
        student = self._taps.features(batch, logits, maps=self._sees_maps)
        teacher = self._recorded.features(indices, batch.mask, maps=self._sees_maps)
        sides = [
            math.isqrt(min(y.shape[1], x.shape[1])) if y.shape[1] != x.shape[1] else None
            for y, x in zip(student.blocks, teacher.blocks, strict=True)
        ]
        return tuple(
            replace(one, blocks=[pooled(block, side) for block, side in zip(one.blocks, sides, strict=True)])
            for one in (student, teacher)
        )

    def prepare(self, student: nn.Module, samples: Samples, seed: int) -> None:
        """Make the projections, whose first values follow from the seed."""
        indices = torch.arange(2, device=samples.device)
        batch = samples.batch(indices)
        with torch.no_grad():
            logits = batch(student.eval())
        torch.manual_seed(seed)
        self.loss = self._make(*self.features(batch, indices, logits)).to(samples.device)

    def forward(self, batch: Batch, indices: Tensor, logits: Tensor) -> Tensor:
        """The loss of a batch."""
        value: Tensor = self.loss(*self.features(batch, indices, logits))
        return value


def fit(run: Run, method: Method, student: nn.Module, samples: Samples) -> Row:
    """Train in place; what was measured."""
    recorded = recorded_of(run, str(samples.device)) if method.uses_teacher else None
    layers = {} if recorded is None else {"layers": [f"{pair.student} -> {pair.teacher}" for pair in recorded.pairs]}
    replay: Replay | None = None
    transfer: RepresentationTransfer | None = None
    rival: Rival | None = None
    with ExitStack() as stack:
        if method.transfer is not None and recorded is not None:
            replay = Replay(recorded)
            tuned = "distillation" if method.distillation else "weight"
            changed = {name: value for name, value in run.options if name != TEACHER_LAYERS}
            options = {**method.transfer, tuned: run.weight, "seed": run.seed, **changed}
            transfer = RepresentationTransfer(replay, replay.pairs, teacher_inputs=replay.inputs, **options)
            stack.enter_context(transfer.attached(student))
        if method.loss is not None and recorded is not None:
            taps = stack.enter_context(Taps(student, [pair.student for pair in recorded.pairs]))
            rival = Rival(method, recorded, taps)
            rival.prepare(student, samples, run.seed)
        penalty = _start_penalty(student) if method.l2_sp else None
        optimizer, schedule = make_optimizer(
            student.parameters(), run.lr, run.weight_decay, run.steps, [] if rival is None else rival.parameters()
        )
        batches = Batches(len(samples), run.batch_size, run.seed)
        student.train()
        # Dropout is the same for all methods of a seed.
        torch.manual_seed(run.seed)
        start = time.process_time()
        for _ in range(run.steps):
            indices = batches.next().to(samples.device)
            batch = samples.batch(indices)
            if replay is not None:
                replay.indices = indices
            logits = batch(student)
            loss = F.cross_entropy(logits, samples.labels[indices])
            if transfer is not None:
                loss = loss + transfer.loss()
            if rival is not None:
                loss = loss + run.weight * rival(batch, indices, logits)
            if penalty is not None:
                loss = loss + run.weight * penalty()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        spent = time.process_time() - start
    return {"step_ms": round(1000 * spent / run.steps, 2), **layers}


def _start_penalty(student: nn.Module) -> Callable[[], Tensor]:
    """L2-SP from the weights as they are; those of the head are new and not held."""
    parameters = dict(student.named_parameters())
    start = {name: value.detach().clone() for name, value in parameters.items() if not name.startswith("classifier.")}
    return lambda: l2_sp(parameters, start)


@torch.no_grad()
def accuracy(net: nn.Module, held_out: Samples) -> float:
    """Accuracy in percent."""
    net.eval()
    predicted = torch.cat([batch(net).argmax(1) for batch in held_out.chunks()])
    return 100 * float((predicted == held_out.labels).double().mean())


def ridge_accuracy(run: Run, problem: Problem) -> float:
    """Accuracy of a linear head on the frozen teacher's features, in closed form; the penalty is the run's weight."""
    device = str(problem.train.device)
    train, held_out = _frozen_features(replace(run, lr=0.0, weight_decay=0.0, weight=0.0, steps=0), device)
    targets = F.one_hot(problem.train.labels, problem.num_classes).double()
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    x = (train - mean) / std
    gram = x.mT @ x / len(x) + run.weight * torch.eye(x.shape[1], dtype=x.dtype, device=device)
    weights = torch.linalg.solve(gram, x.mT @ (targets - targets.mean(0)) / len(x))
    scores = (held_out - mean) / std @ weights + targets.mean(0)
    return 100 * float((scores.argmax(1) == problem.held_out.labels).double().mean())


@functools.lru_cache(maxsize=1)
def _frozen_features(run: Run, device: str) -> tuple[Tensor, Tensor]:
    """What enters a linear head on the teacher, of training and held-out samples, in float64."""
    name = names_of(run)[0]
    teacher, problem = teacher_of(name, device), problem_of(run, device)
    found = []
    for samples in (problem.train, problem.held_out):
        rows = []
        with torch.no_grad(), Taps(teacher, [FEATURES[name]]) as taps:
            for batch in samples.chunks(64):
                batch(teacher)
                rows.append(taps.outputs[0].flatten(1))
        found.append(torch.cat(rows).double())
    return found[0], found[1]
