"""Properties that the default term has for every architecture, whatever way its forward is written."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from forwards.architectures import ARCHITECTURES, BATCH
from torch import Tensor, nn

from lightning_otrt import RepresentationTransfer

NAMES = [pytest.param(name, marks=pytest.mark.slow if entry.slow else ()) for name, entry in ARCHITECTURES.items()]
#: Tests of one architecture follow each other, and share its networks.
of_each = pytest.mark.parametrize("subject", NAMES, indirect=True, scope="module")


def make(teacher: nn.Module, **options: Any) -> RepresentationTransfer:
    """Its plan is fixed: a solved one takes long in float64, and depends on the same readings."""
    return RepresentationTransfer(teacher, weight=1.0, plan="random", **options)


class Subject:
    """A student and a teacher of one architecture with other weights, in float64, in evaluation mode."""

    def __init__(self, name: str) -> None:
        self.name, self.entry = name, ARCHITECTURES[name]
        torch.manual_seed(0)
        # In evaluation mode batch statistics and dropout do not tie samples together or draw numbers.
        self.student = self.entry.build().double().eval()
        self.teacher = self.entry.build().double().eval()
        self.called: nn.Module = self.student.get_submodule(self.entry.root)

    def batch(self) -> dict[str, Any]:
        return self.entry.inputs(torch.Generator().manual_seed(1))

    def run(
        self, batch: dict[str, Any], *, by_position: bool = False
    ) -> tuple[Tensor, RepresentationTransfer, list[str]]:
        """The term of a batch, the transfer and its reports."""
        teacher = self.teacher.get_submodule(self.entry.root)
        transfer = make(teacher, student_root=self.entry.root or None)
        reports: list[str] = []
        transfer.report = reports.append
        with transfer.attached(self.student):
            if by_position:
                args, kwargs = positional(self.called, batch)
                self.called(*args, **kwargs)
            else:
                self.called(**batch)
            return transfer.loss(), transfer, reports

    def term(self, batch: dict[str, Any], *, by_position: bool = False) -> float:
        return float(self.run(batch, by_position=by_position)[0].detach())


@dataclass(frozen=True)
class Plain:
    """What an architecture gives for its batch, which each property is compared with.

    Attributes:
        term: The term.
        pairs: The layers that were chosen.
        reports: What was printed.
        trained: Parameters of the student that require a gradient.
        reached: Parameters of the student that got one from the term.
    """

    term: float
    pairs: list[tuple[str, str]]
    reports: list[str]
    trained: int
    reached: int


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest) -> Subject:
    """Networks that no test changes."""
    return Subject(request.param)


@pytest.fixture(scope="module")
def plain(subject: Subject) -> Plain:
    """It is the same for all properties, and a trace of two networks takes long."""
    loss, transfer, reports = subject.run(subject.batch())
    loss.backward()
    parameters = list(subject.student.parameters())
    reached = sum(p.grad is not None for p in parameters)
    subject.student.zero_grad()
    return Plain(
        term=float(loss.detach()),
        pairs=[(pair.student, pair.teacher) for pair in transfer.pairs],
        reports=reports,
        trained=sum(p.requires_grad for p in parameters),
        reached=reached,
    )


def positional(module: nn.Module, batch: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """As many leading arguments as the batch has in the order of the signature, the others by name."""
    names = list(inspect.signature(module.forward).parameters)
    args, left = [], dict(batch)
    for name in names:
        if name not in left:
            break
        args.append(left.pop(name))
    return args, left


@of_each
def test_order_of_samples_which_come_by_position(subject: Subject, plain: Plain) -> None:
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(2))
    shuffled = {key: value.index_select(subject.entry.batch_axis, order) for key, value in subject.batch().items()}
    assert subject.term(shuffled, by_position=True) == pytest.approx(plain.term, rel=1e-6, abs=1e-9)


@of_each
def test_content_of_padding(subject: Subject, plain: Plain) -> None:
    if subject.entry.padding is None:
        return
    batch = subject.batch()
    other = subject.entry.padding(batch, torch.Generator().manual_seed(3))
    assert any(not torch.equal(other[key], value) for key, value in batch.items())
    assert subject.term(other) == pytest.approx(plain.term, rel=1e-6)


class LabelFirst(nn.Module):
    """The network behind a forward that takes something else first."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, first: Tensor, **batch: Any) -> Any:
        return self.net(**batch)


FIRST = {
    "labels": lambda: torch.arange(BATCH),
    "camera matrices": lambda: torch.eye(4, dtype=torch.float64).repeat(BATCH, 1, 1),
    "uint8 images": lambda: torch.zeros(BATCH, 3, 40, 40, dtype=torch.uint8),
    "one number": lambda: torch.tensor(0.5, dtype=torch.float64),
}


#: Each takes a second: by default all that may stand first, and one of each family, the rest where slow tests run.
QUICK = {
    ("resnet18", "uint8 images"),
    ("timm vit", "camera matrices"),
    ("BERT", "labels"),
    ("T5", "one number"),
}


@pytest.mark.parametrize(
    ("subject", "first"),
    [
        pytest.param(name, first, marks=[] if (name, first) in QUICK else [pytest.mark.slow])
        for name, entry in ARCHITECTURES.items()
        for first in FIRST
        if not entry.root  # which gets images alone
    ],
    indirect=["subject"],
    scope="module",
)
def test_what_stands_first(subject: Subject, first: str, plain: Plain) -> None:
    """Another first argument changes neither the layers nor the term."""
    transfer = make(LabelFirst(subject.teacher))
    student = LabelFirst(subject.student)
    with transfer.attached(student):
        student(FIRST[first](), **subject.batch())
        value = float(transfer.loss().detach())
    found = [(pair.student, pair.teacher) for pair in transfer.pairs]
    assert found == [(f"net.{student}", f"net.{teacher}") for student, teacher in plain.pairs]
    assert value == pytest.approx(plain.term, rel=1e-6)  # parts of T5 compute in float32


#: Trained tensors that are printed as lying before the recorded layers and get no gradient from the term.
MORE_THAN_TRAINED = {
    "CLIP": 4,  # what the image tower does after its last block runs before the text tower; the scale of the logits
    "DINOv2": 1,  # the mask token of pretraining
}


def reach(reports: list[str]) -> tuple[int, int]:
    """The numbers of the printed line: trained tensors before the recorded layers, and all of them."""
    [found] = re.findall(r"^root: .*; (\d+) of (\d+) trained tensors", "\n".join(reports), re.MULTILINE)
    return int(found[0]), int(found[1])


@of_each
def test_reach_is_printed_and_is_what_gets_a_gradient(subject: Subject, plain: Plain) -> None:
    before, trained = reach(plain.reports)
    assert trained == plain.trained
    assert before - plain.reached == MORE_THAN_TRAINED.get(subject.name, 0)
    assert before > trained / 2


class DeepHead(nn.Module):
    """Few convolutions before many layers without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.mlp = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6)], nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.stem(x).mean((2, 3)))


class WithUnused(nn.Module):
    """A decoder that this step does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.decoder = nn.Sequential(*[nn.Conv2d(8, 8, 3) for _ in range(3)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean((2, 3)))


def albert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.AlbertModel(transformers.AlbertConfig(vocab_size=50, embedding_size=8, **sizes)).eval()


#: Networks of which the default reaches a small part, or no block: the inputs, and the reason that is printed.
REASONS: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "convolutions before a deep head": (
        DeepHead,
        torch.randn(BATCH, 3, 16, 16),
        "4 of 18 trained tensors lie before the recorded layers. Of the others 14 run after them.",
    ),
    "a decoder that does not run": (
        WithUnused,
        torch.randn(BATCH, 3, 16, 16),
        "2 of 10 trained tensors lie before the recorded layers. Of the others 2 run after them and 6 are in modules",
    ),
    "one layer that runs four times": (
        albert,
        torch.randint(50, (BATCH, 9)),
        'No blocks were found, so "auto" uses "penultimate". Student (AlbertModel) and teacher (AlbertModel): one',
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_small_reach_has_a_printed_reason(name: str) -> None:
    build, batch, reason = REASONS[name]
    student, transfer = build(), make(build())
    reports: list[str] = []
    transfer.report = reports.append
    with transfer.attached(student):
        student(batch)
        transfer.loss()
    assert reason in "\n".join(reports)
