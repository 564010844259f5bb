"""A task that trains no softmax of the logits is seen in its gradient, in any loop, and without false alarms."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_otrt import LogitDistillation, RepresentationTransfer

BATCH, CLASSES = 16, 7
SEEMS = "the task seems to train none"
TARGETS = torch.arange(BATCH) % CLASSES
LABELS = torch.rand(BATCH, CLASSES, generator=torch.Generator().manual_seed(1)).gt(0.6).float()
NUMBERS = torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(2))
MIXED = 0.3 * F.one_hot(TARGETS, CLASSES) + 0.7 * F.one_hot(TARGETS.flip(0), CLASSES)
WEIGHTS = torch.linspace(0.1, 4, CLASSES)


def focal(logits: Tensor) -> Tensor:
    """The focal loss of classes (arXiv 1708.02002), in formulas."""
    log_p = logits.log_softmax(1).gather(1, TARGETS[:, None])
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def focal_of_labels(logits: Tensor) -> Tensor:
    """The same for each label by itself."""
    p = torch.where(LABELS.bool(), logits.sigmoid(), 1 - logits.sigmoid())
    return -((1 - p) ** 2 * p.log()).mean()


def asymmetric(logits: Tensor) -> Tensor:
    """The asymmetric loss of labels (arXiv 2009.14119)."""
    p = logits.sigmoid()
    negative = (p - 0.05).clamp(min=0)
    return -(LABELS * p.log() + (1 - LABELS) * negative**4 * (1 - negative).log()).mean()


def angular(logits: Tensor) -> Tensor:
    """An additive margin between classes (arXiv 1801.05599)."""
    return F.cross_entropy(10 * (logits - 0.35 * F.one_hot(TARGETS, CLASSES)), TARGETS)


def with_small_penalty(logits: Tensor) -> Tensor:
    """The penalty on the normaliser of large language models (arXiv 2204.02311)."""
    return F.cross_entropy(logits, TARGETS) + 1e-4 * logits.logsumexp(1).square().mean()


def poly(logits: Tensor) -> Tensor:
    """Poly-1 (arXiv 2204.12511)."""
    p = logits.softmax(1).gather(1, TARGETS[:, None])
    return F.cross_entropy(logits, TARGETS) + (1 - p).mean()


#: Losses of a softmax: nothing may be said.
OF_CLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross-entropy": lambda x: F.cross_entropy(x, TARGETS),
    "label smoothing": lambda x: F.cross_entropy(x, TARGETS, label_smoothing=0.1),
    "class weights": lambda x: F.cross_entropy(x, TARGETS, weight=WEIGHTS),
    "ignored targets": lambda x: F.cross_entropy(x, TARGETS.masked_fill(TARGETS > 2, -100)),
    "sum": lambda x: F.cross_entropy(x, TARGETS, reduction="sum"),
    "mixup": lambda x: F.cross_entropy(x, MIXED),
    "two targets": lambda x: 0.3 * F.cross_entropy(x, TARGETS) + 0.7 * F.cross_entropy(x, TARGETS.flip(0)),
    "by hand": lambda x: -(MIXED * x.log_softmax(1)).sum(1).mean(),
    "focal": focal,
    "poly": poly,
    "margin": angular,
    "adjusted logits": lambda x: F.cross_entropy(x + WEIGHTS.log(), TARGETS),
    "temperature": lambda x: F.cross_entropy(x / 0.1, TARGETS),
    "multi-class hinge": lambda x: F.multi_margin_loss(x, TARGETS),
    "score of probabilities": lambda x: F.mse_loss(x.softmax(1), MIXED),
    "entropy beside": lambda x: F.cross_entropy(x, TARGETS) + 0.1 * (x.softmax(1) * x.log_softmax(1)).sum(1).mean(),
    "consistency of probabilities": lambda x: F.cross_entropy(x, TARGETS) + F.mse_loss(x.softmax(1), MIXED.flip(0)),
    "small penalty": with_small_penalty,
    "scaled": lambda x: 65536 * F.cross_entropy(x, TARGETS),
    "a task beside": lambda x: 0.0 * x.sum(),
}
#: Other losses.
OF_OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "labels": lambda x: F.binary_cross_entropy_with_logits(x, LABELS),
    "one label": lambda x: F.binary_cross_entropy_with_logits(x, F.one_hot(TARGETS, CLASSES).float()),
    "labels, sigmoid": lambda x: F.binary_cross_entropy(x.sigmoid(), LABELS),
    "labels, focal": focal_of_labels,
    "labels, asymmetric": asymmetric,
    "labels, by hand": lambda x: (F.softplus(x) - LABELS * x).mean(),
    "labels, soft margin": lambda x: F.multilabel_soft_margin_loss(x, LABELS),
    "squared error": lambda x: F.mse_loss(x, NUMBERS),
    "absolute error": lambda x: (x - NUMBERS).abs().mean(),
    "Huber": lambda x: F.huber_loss(x, NUMBERS),
    "one of the numbers": lambda x: F.smooth_l1_loss(x[:, 0], NUMBERS[:, 0]),
    "angle": lambda x: -F.cosine_similarity(x, NUMBERS).mean(),
}


def network(width: int = 8, head: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), head or nn.Linear(width, CLASSES))


@contextmanager
def caught() -> Iterator[list[str]]:
    found: list[str] = []
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        yield found
    found += [str(each.message) for each in noted if SEEMS in str(each.message)]


def train(
    loss: Callable[[Tensor], Tensor],
    option: float | LogitDistillation = 1.0,
    *,
    student: nn.Module | None = None,
    steps: int = 3,
    backward: Callable[[Tensor], None] = Tensor.backward,
    call: Callable[[nn.Module, Tensor], Any] = lambda student, x: student(x),
    layers: Any = "penultimate",
    teacher: nn.Module | None = None,
) -> list[str]:
    """The warnings of a loop of one's own."""
    torch.manual_seed(0)
    student, x = network() if student is None else student, torch.randn(BATCH, 5)
    transfer = RepresentationTransfer(teacher or network(12), layers, plan="uniform", distillation=option)
    with caught() as found, transfer.attached(student):
        for _ in range(steps):
            value = loss(call(student, x))
            backward(value + transfer.loss())
    return found


@pytest.mark.parametrize("name", OF_CLASSES)
def test_no_word_on_a_loss_of_classes(name: str) -> None:
    assert train(OF_CLASSES[name]) == []


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_no_word_on_logarithms_of_a_softmax(scale: float) -> None:
    """As in the examples of torch: a log-softmax in the network, and the loss on that."""
    heads = [nn.Sequential(nn.Linear(width, CLASSES), nn.LogSoftmax(1)) for width in (8, 12)]
    student, teacher = network(8, heads[0]), network(12, heads[1])
    loss = lambda x: scale * F.nll_loss(x, TARGETS)  # noqa: E731
    assert train(loss, student=student, teacher=teacher, layers=["0"]) == []


@pytest.mark.parametrize("name", OF_OTHERS)
def test_one_warning_of_another_loss(name: str) -> None:
    (found,) = train(OF_OTHERS[name])
    assert "LogitDistillation(activation='sigmoid')" in found
    assert "LogitDistillation(features=" in found
    assert 5 <= int(re.findall(r"to (\d+)% of their size", found)[0]) <= 100


@pytest.mark.parametrize("option", [LogitDistillation(activation="sigmoid"), LogitDistillation(activation="softmax")])
def test_a_chosen_activation_is_meant(option: LogitDistillation) -> None:
    assert train(OF_OTHERS["labels"], option) == []


def test_a_regression_of_the_logits_is_not_looked_at() -> None:
    assert train(OF_OTHERS["labels"], LogitDistillation(features="0")) == []
    other = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 4))
    assert train(OF_OTHERS["squared error"], teacher=other) == []


def test_classes_with_another_loss_beside() -> None:
    """It cannot be told from other tasks: the warning says that it seems so, and what to pass."""

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, TARGETS) + F.mse_loss(logits, NUMBERS)

    (found,) = train(loss)
    assert "activation='softmax') says that it is meant" in found
    assert train(loss, LogitDistillation(activation="softmax")) == []


def test_a_single_step_is_told_at_the_end() -> None:
    assert len(train(OF_OTHERS["labels"], steps=1)) == 1
    assert train(OF_CLASSES["focal"], steps=1) == []


def test_the_first_backward_pass_may_overflow() -> None:
    scales = iter([float("inf"), float("nan"), 1.0, 1.0])
    assert len(train(lambda x: next(scales) * OF_OTHERS["labels"](x), steps=4)) == 1
    scales = iter([float("inf"), float("nan"), 1.0, 1.0])
    assert train(lambda x: next(scales) * OF_CLASSES["focal"](x), steps=4) == []


def test_a_call_without_backward_is_not_the_last() -> None:
    passes = iter([lambda loss: None, Tensor.backward, Tensor.backward])
    assert len(train(OF_OTHERS["labels"], backward=lambda loss: next(passes)(loss))) == 1


def test_accumulated_gradients() -> None:
    assert train(lambda x: OF_CLASSES["class weights"](x) / 4, steps=8) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["autocast", "true"])
class TestHalfPrecision:
    def run(self, loss: Callable[[Tensor], Tensor], dtype: torch.dtype, kind: str, scale: float = 1.0) -> list[str]:
        torch.manual_seed(0)
        wide = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 1000))
        teacher = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 1000))
        student = wide.to(dtype) if kind == "true" else wide

        def call(student: nn.Module, x: Tensor) -> Tensor:
            if kind == "true":
                return student(x.to(dtype))
            with torch.autocast("cpu", dtype=dtype):
                return student(x)

        def scaled(logits: Tensor) -> Tensor:
            return scale * loss(logits if kind == "true" else logits.float())

        inputs = {"teacher": teacher.to(dtype) if kind == "true" else teacher}
        return train(scaled, student=student, call=call, **inputs)

    @pytest.mark.parametrize("scale", [1.0, 1e-3, 1024.0])
    @pytest.mark.parametrize("sharpness", [1.0, 20.0])
    def test_no_word_on_classes(self, dtype: torch.dtype, kind: str, scale: float, sharpness: float) -> None:
        """Small gradients of many classes are rounded to 0 in float16."""
        targets = torch.arange(BATCH) * 60
        assert not self.run(lambda x: F.cross_entropy(sharpness * x, targets), dtype, kind, scale)
        assert not self.run(lambda x: F.cross_entropy(sharpness * x, targets, label_smoothing=0.1), dtype, kind, scale)

    def test_a_warning_of_labels(self, dtype: torch.dtype, kind: str) -> None:
        labels = torch.zeros(BATCH, 1000)
        labels[:, :30] = 1
        assert self.run(lambda x: F.binary_cross_entropy_with_logits(x, labels.to(x.dtype)), dtype, kind)


def own_distillation(logits: Tensor) -> Tensor:
    """A user's own distillation from the same teacher, whose logits a copy has."""
    return F.kl_div(
        (logits.float() / 2).log_softmax(1), (logits.detach().float() / 2).softmax(1), reduction="batchmean"
    )


#: What a recovery without labels may add to the term.
WITHOUT_LABELS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: torch.zeros(()),
    "zero": lambda x: 0.0 * x.sum(),
    "distillation": own_distillation,
}


@pytest.mark.parametrize("kind", ["float32", "autocast"])
@pytest.mark.parametrize("classes", [7, 1000])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
class TestCopies:
    """The student starts as a copy of the teacher: the gradient of the distillation is rounding noise."""

    def run(self, kind: str, classes: int, scale: float, loss: Callable[[Tensor], Tensor], **options: Any) -> list[str]:
        torch.manual_seed(3)
        student = network(64, nn.Linear(64, classes))
        student[2].weight.data.mul_(20.0)

        def call(student: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                return student(x)

        backward = lambda total: (scale * total).backward()  # noqa: E731
        teacher = copy.deepcopy(student)
        return train(loss, student=student, teacher=teacher, call=call, backward=backward, **options)

    @pytest.mark.parametrize("name", WITHOUT_LABELS)
    @pytest.mark.parametrize("weight", [0.1, 1.0, 30.0])
    def test_no_word_on_rounding(self, kind: str, classes: int, scale: float, name: str, weight: float) -> None:
        assert self.run(kind, classes, scale, WITHOUT_LABELS[name], option=weight) == []

    @pytest.mark.parametrize("share", [1.0, 1e-2])
    def test_a_warning_of_labels(self, kind: str, classes: int, scale: float, share: float) -> None:
        def loss(logits: Tensor) -> Tensor:
            labels = torch.zeros(logits.shape)
            labels[:, :3] = 1
            return share * F.binary_cross_entropy_with_logits(logits.float(), labels)

        assert len(self.run(kind, classes, scale, loss)) == 1


def test_labels_are_told_when_they_come_after_rounding() -> None:
    """A first step without any task says nothing, and the next ones are looked at."""
    student, weights = network(), iter([0.0, 1.0, 1.0])
    loss = lambda x: next(weights) * OF_OTHERS["labels"](x)  # noqa: E731
    assert len(train(loss, student=student, teacher=copy.deepcopy(student))) == 1


class Dense(nn.Module):
    """Class logits of pixels or of tokens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.body = nn.Conv2d(3, 6, 3, padding=1) if kind == "pixels" else nn.Linear(3, 6)
        self.head = nn.Conv2d(6, 4, 1) if kind == "pixels" else nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"aux": x.mean(), "logits": self.head(self.body(x).relu())}


@pytest.mark.parametrize("kind", ["pixels", "tokens"])
def test_dense_logits(kind: str) -> None:
    x = torch.randn(4, 3, 8, 8) if kind == "pixels" else torch.randn(4, 9, 3)
    axis = 1 if kind == "pixels" else 2

    def of_classes(output: dict[str, Tensor]) -> Tensor:
        logits = output["logits"].movedim(axis, -1).flatten(0, -2)
        if kind == "pixels":  # of another size, as in a segmentation
            logits = F.interpolate(output["logits"], 16, mode="bilinear").movedim(1, -1).flatten(0, -2)
        return F.cross_entropy(logits, torch.arange(len(logits)) % 4)

    def of_labels(output: dict[str, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(output["logits"], torch.ones_like(output["logits"]))

    for loss, count in ((of_classes, 0), (of_labels, 1)):
        options = {"student": Dense(kind), "teacher": Dense(kind), "layers": ["body"]}
        assert len(train(loss, call=lambda student, _: student(x), **options)) == count


def test_the_transport_of_the_logits_is_not_taken_for_the_task() -> None:
    assert train(OF_CLASSES["cross-entropy"], layers=["2"]) == []
    assert len(train(OF_OTHERS["labels"], layers=["2:input"])) == 1


def test_logits_that_are_written_to_are_not_judged() -> None:
    """The gradient that arrives is that of the new values."""
    assert train(lambda x: F.nll_loss(x.copy_(x.softmax(1)).log(), TARGETS)) == []


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


@pytest.mark.parametrize("loss", ["labels", "focal"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled(loss: str, fullgraph: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(Network(), backend="aot_eager", fullgraph=fullgraph)
    found = train({**OF_CLASSES, **OF_OTHERS}[loss], student=compiled, teacher=Network())
    assert len(found) == (loss == "labels")


@pytest.mark.parametrize("loss", ["labels", "focal"])
def test_activation_checkpointing(loss: str) -> None:
    found = train(
        {**OF_CLASSES, **OF_OTHERS}[loss], call=lambda student, x: checkpoint(student, x, use_reentrant=False)
    )
    assert len(found) == (loss == "labels")


def test_several_forwards_of_a_step() -> None:
    def both(student: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([student(x), student(-x)])

    def of_classes(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, TARGETS.repeat(2)) + F.mse_loss(*logits.softmax(1).chunk(2))

    assert train(of_classes, call=both) == []
    assert len(train(lambda x: F.mse_loss(x, NUMBERS.repeat(2, 1)), call=both)) == 1


def test_no_hook_in_later_steps() -> None:
    torch.manual_seed(0)
    student, x, hooks = network(), torch.randn(BATCH, 5), []
    with RepresentationTransfer(network(12), "penultimate", distillation=1.0).attached(student) as transfer:
        for _ in range(3):
            logits = student(x)
            loss = F.cross_entropy(logits, TARGETS) + transfer.loss()
            hooks.append(len(logits._backward_hooks or ()))
            loss.backward()
    assert hooks == [1, 0, 0]
