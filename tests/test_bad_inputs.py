"""What users do wrong, what they are told, and that nothing is lost: each row of a table is one mistake.

A row names the mistake, the way to make it, the kind of error and words of its message: what, where, why, what to do.
After every error the networks are as they came, and a fit with the mistake mended is the fit without it, bit for bit.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning as other_lightning
import torch
from conftest import EXPECTED_WARNINGS
from helpers import (
    CLASSES,
    LAYERS,
    Net,
    Task,
    assert_same,
    differ,
    hooks,
    loader,
    make_data,
    make_task,
    make_teacher,
    make_trainer,
    seeded,
    weights,
)
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_otrt import (
    CosineDecay,
    LayerPair,
    LinearWarmup,
    OTRTCallback,
    OTRTModule,
    RepresentationTransfer,
    load_teacher,
    neurons,
    transport_distance,
)
from lightning_otrt.analysis.metric import NeuronTransportDistance

NAN, INF = float("nan"), float("inf")
Error = type[BaseException]


def told(found: BaseException | str, words: tuple[str, ...]) -> None:
    """All words are in the message."""
    missing = [word for word in words if word not in str(found)]
    assert not missing, f"{missing} missing in: {found}"


# Arguments: calls that need no fit

Y, X = torch.randn(4, 8, generator=torch.Generator().manual_seed(5)), torch.randn(6, 8)
IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(6))


class Bare(pl.LightningModule):
    """Has no forward."""


class OtherTask(other_lightning.LightningModule):
    """A module of the other Lightning package."""

    def __init__(self) -> None:
        super().__init__()
        self.net = seeded(0, Net)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def callback(**options: Any) -> OTRTCallback:
    return OTRTCallback(Net(4), **{"layers": LAYERS, **options})


def saved(path: Path, content: Any) -> str:
    torch.save(content, path / "teacher.ckpt")
    return str(path / "teacher.ckpt")


def maps(*shape: int, **options: Any) -> Tensor:
    return neurons(torch.zeros(shape), **options)


def update(student: Any, teacher: Any) -> None:
    NeuronTransportDistance(4, 6).update(student, teacher)


Call = Callable[[Path], Any]
ARGUMENTS: list[tuple[str, Call, Error, tuple[str, ...]]] = [
    # Options of the term
    ("weight negative", lambda _: callback(weight=-1), ValueError, ("`weight`", "not negative", "-1")),
    ("weight NaN", lambda _: callback(weight=NAN), ValueError, ("`weight`", "finite", "nan")),
    ("weight a string", lambda _: callback(weight="8"), TypeError, ("`weight`", "number", "str")),
    (
        "epsilon zero",
        lambda _: callback(epsilon=0),
        ValueError,
        ("`epsilon`", "between 0 and 1", "relative to the mean"),
    ),
    (
        "epsilon negative",
        lambda _: callback(epsilon=-0.1),
        ValueError,
        ("`epsilon`", "-0.1", "0.01 is close to an exact"),
    ),
    ("epsilon NaN", lambda _: callback(epsilon=NAN), ValueError, ("`epsilon`", "nan")),
    (
        "epsilon of a uniform plan",
        lambda _: callback(epsilon=5.0),
        ValueError,
        ("`epsilon`", "at 1 the plan is uniform"),
    ),
    (
        "plan unknown",
        lambda _: callback(plan="emd"),
        ValueError,
        ("`plan`", "'sinkhorn', 'exact', 'identity'", "'emd'"),
    ),
    (
        "cost unknown",
        lambda _: callback(cost="cosine"),
        ValueError,
        ("`cost`", "'correlation', 'euclidean'", "'cosine'"),
    ),
    ("cost no function", lambda _: callback(cost=2), TypeError, ("`cost`", "a name or a callable", "int")),
    ("memory of one", lambda _: callback(memory=1.0), ValueError, ("`memory`", "[0, 1)", '`plan="static"` keeps one')),
    ("solve_every zero", lambda _: callback(solve_every=0), ValueError, ("`solve_every`", "positive integer", "0")),
    ("grid zero", lambda _: callback(grid=0), ValueError, ("`grid`", "positive integer", "0")),
    ("seed a string", lambda _: callback(seed="1"), TypeError, ("`seed`", "an integer", "'1'")),
    ("strict a string", lambda _: callback(strict="no"), TypeError, ("`strict`", "True or False", "'no'")),
    ("global_batch a string", lambda _: callback(global_batch="yes"), TypeError, ("`global_batch`", "'yes'")),
    ("schedule no function", lambda _: callback(schedule=0.5), TypeError, ("`schedule`", "callable", "float")),
    ("warm-up of no steps", lambda _: LinearWarmup(0), ValueError, ("`steps`", "at least 1")),
    ("decay to NaN", lambda _: CosineDecay(5, final=NAN), ValueError, ("`final`", "finite", "nan")),
    (
        "adapter no function",
        lambda _: callback(teacher_inputs=[1]),
        TypeError,
        ("`teacher_inputs`", "callable", "list"),
    ),
    ("teacher dtype", lambda _: callback(teacher_dtype="int8"), ValueError, ("`teacher_dtype`", "'bf16'", "'int8'")),
    ("option misspelt", lambda _: callback(wieght=2), TypeError, ("unexpected keyword argument", "wieght")),
    ("pair weight zero", lambda _: LayerPair("a", "b", 0), ValueError, ("`weight`", "'a' -> 'b'", "positive")),
    (
        "pair weight negative",
        lambda _: LayerPair("a", "b", -2),
        ValueError,
        ("`weight`", "'a' -> 'b'", "positive", "-2"),
    ),
    ("pair weight infinite", lambda _: LayerPair("a", "b", INF), ValueError, ("'a' -> 'b'", "finite", "inf")),
    (
        "pair of a module",
        lambda _: LayerPair(nn.Identity(), "b"),
        TypeError,
        ("`student`", "name of a layer", "Identity()"),
    ),
    ("pair axis", lambda _: LayerPair("a", "b", neuron_axis="1"), TypeError, ("`neuron_axis`", "'a' -> 'b'", "'1'")),
    # Teachers and tasks
    ("teacher None", lambda _: OTRTCallback(None), TypeError, ("`teacher`", "nn.Module", "NoneType")),
    ("teacher a class", lambda _: OTRTCallback(Net), TypeError, ("the class Net", "pass an instance")),
    ("teacher a state dict", lambda _: OTRTCallback({"w": X}), TypeError, ("a checkpoint with its class", "dict")),
    ("teacher without forward", lambda _: OTRTCallback(Bare()), TypeError, ("Bare", "no `forward`", "Define one")),
    (
        "teacher name misspelt",
        lambda _: load_teacher("resnet51"),
        ValueError,
        ("'resnet51'", "Did you mean 'resnet50'"),
    ),
    (
        "teacher weights misspelt",
        lambda _: load_teacher("resnet18:V9"),
        ValueError,
        ("'V9'", "IMAGENET1K_V1", "None for"),
    ),
    (
        "no such file",
        lambda p: load_teacher((str(p / "a.ckpt"), Net)),
        FileNotFoundError,
        ("no checkpoint file", "a.ckpt"),
    ),
    (
        "file without class",
        lambda p: load_teacher(saved(p, {})),
        TypeError,
        ("`model_class`", "None", "model_class=MyModule"),
    ),
    (
        "file lacks keys",
        lambda p: load_teacher((saved(p, {"body.weight": X}), Net)),
        ValueError,
        ("do not fit Net", "Missing: 'block1.0.weight'", "more", "Unexpected: 'body.weight'"),
    ),
    (
        "file refused by weights_only",
        lambda p: load_teacher((saved(p, seeded(0, Net)), Net)),
        RuntimeError,
        ("could not be read", "teacher.ckpt", "can run any code", "weights_only=False"),
    ),
    (
        "task no LightningModule",
        lambda _: OTRTModule(Net(), Net(), LAYERS),
        TypeError,
        ("`task` to be a LightningModule", "Net"),
    ),
    (
        "task of the other package",
        lambda _: OTRTModule(OtherTask(), Net(), LAYERS),
        TypeError,
        ("`task`", "`lightning` package", "OtherTask is one of `pytorch_lightning`", "import lightning as L"),
    ),
    (
        "task compiled",
        lambda _: OTRTModule(torch.compile(Task(), backend="eager"), Net(), LAYERS),
        TypeError,
        ("a compiled one", "Wrap it first, then compile"),
    ),
    (
        "task wrapped twice",
        lambda _: OTRTModule(OTRTModule(Task(), Net(), LAYERS), Net(), LAYERS),
        MisconfigurationException,
        ("wrapped by OTRTModule already", "OTRTCallback", "second teacher"),
    ),
    # Neurons and their distance
    ("neurons 0-D", lambda _: maps(), ValueError, ("(batch, neurons, ...)", "got ()")),
    ("neurons 1-D", lambda _: maps(8), ValueError, ("(batch, neurons, ...)", "(8,)", "axis of samples")),
    ("neuron axis ambiguous", lambda _: maps(2, 3, 4), ValueError, ("(2, 3, 4)", "ambiguous", "`neuron_axis=1` for")),
    ("neuron axis that of samples", lambda _: maps(2, 3, neuron_axis=0), ValueError, ("(2, 3)", "its batch axis (0)")),
    ("neuron axis out of range", lambda _: maps(2, 3, neuron_axis=5), ValueError, ("`neuron_axis`", "[-2, 1]", "5")),
    ("batch axis", lambda _: maps(2, 3, batch_axis=7), ValueError, ("`batch_axis`", "(T, B, C)", "7")),
    (
        "grid of no positions",
        lambda _: maps(2, 3, 4, 4, neuron_axis=1, grid=0),
        ValueError,
        ("`grid`", "positive integer", "0"),
    ),
    ("map without positions", lambda _: maps(2, 3, 0, 4, neuron_axis=1), ValueError, ("is empty", "(2, 3, 0, 4)")),
    (
        "tokens all prefix",
        lambda _: maps(2, 5, 3, neuron_axis=-1, prefix_tokens=5),
        ValueError,
        ("No token is left", "5"),
    ),
    (
        "prefix negative",
        lambda _: maps(2, 5, 3, neuron_axis=-1, prefix_tokens=-1),
        ValueError,
        ("`prefix_tokens`", "-1"),
    ),
    (
        "mask shape",
        lambda _: maps(2, 5, 3, neuron_axis=2, mask=X[:2, :4] > 0),
        ValueError,
        ("mask", "(2, 5)", "(2, 4)"),
    ),
    (
        "mask additive",
        lambda _: maps(2, 5, 3, neuron_axis=2, mask=-X[:2, :5].abs()),
        ValueError,
        ("`mask`", "negative"),
    ),
    (
        "mask of a map",
        lambda _: maps(2, 3, 4, 4, neuron_axis=1, mask=X[:2, :4] > 0),
        ValueError,
        ("`mask`", "(2, 3, 4, 4)"),
    ),
    ("mask a list", lambda _: maps(2, 5, 3, neuron_axis=2, mask=[1]), TypeError, ("`mask`", "tensor (B, T)", "list")),
    (
        "output of integers",
        lambda _: neurons(torch.ones(2, 3).long()),
        TypeError,
        ("floating-point", "torch.int64", "(2, 3)"),
    ),
    ("output of several", lambda _: neurons((X, X)), TypeError, ("['Tensor', 'Tensor']", "`select=`")),
    ("select nothing", lambda _: neurons({"a": X}, select="b"), ValueError, ("no 'b'", "keys ['a']")),
    ("distance of arrays", lambda _: transport_distance(Y.numpy(), X), TypeError, ("`student`", "tensor", "ndarray")),
    ("distance of integers", lambda _: transport_distance(Y, X.long()), TypeError, ("`teacher`", "torch.int64")),
    ("distance of complex", lambda _: transport_distance(Y + 0j, X), TypeError, ("`student`", "torch.complex64")),
    (
        "distance of a vector",
        lambda _: transport_distance(Y[0], X),
        ValueError,
        ("`student`", "(neurons, observ", "(8,)"),
    ),
    ("distance of nothing", lambda _: transport_distance(Y[:0], X), ValueError, ("`student`", "non-empty", "(0, 8)")),
    ("observations differ", lambda _: transport_distance(Y[:, :5], X), ValueError, ("(4, 5)", "(6, 8)", "one to one")),
    ("batch on one side", lambda _: transport_distance(Y[None], X), ValueError, ("(1, 4, 8)", "(6, 8)", "agree")),
    (
        "two observations",
        lambda _: transport_distance(Y[:, :2], X[:, :2]),
        ValueError,
        ("2 observations", "at least 3"),
    ),
    (
        "NaN neurons",
        lambda _: transport_distance(Y * NAN, X),
        ValueError,
        ("`student` has 32 NaN", "(4, 8)", "Check its"),
    ),
    ("infinite neurons", lambda _: transport_distance(Y, X * INF), ValueError, ("`teacher` has 48 NaN or infinite",)),
    ("static without training", lambda _: transport_distance(Y, X, plan="static"), ValueError, ("`plan`", "'static'")),
    (
        "identity of two widths",
        lambda _: transport_distance(Y, X, plan="identity"),
        ValueError,
        ("4 student and 6 teacher",),
    ),
    (
        "negative cost",
        lambda _: transport_distance(Y, X, cost=dot),
        ValueError,
        ("not to be negative", "add a constant"),
    ),
    (
        "costs with an infinite mean",
        lambda _: transport_distance(Y, X, cost=lambda y, x: torch.cdist(y, x) * 0 + 3e37),
        ValueError,
        ("finite mean", "up to 3e+37", "Scale the cost"),
    ),
    ("cost of another shape", lambda _: transport_distance(Y, X, cost=row), ValueError, ("(4, 6)", "got (8,)")),
    (
        "cost without gradient",
        lambda _: transport_distance(Y, X, cost=stopped),
        ValueError,
        ("no gradient", "torch operations"),
    ),
    ("masses", lambda _: transport_distance(Y, X, student_mass=-X), TypeError, ("unexpected keyword", "student_mass")),
    (
        "metric of no neurons",
        lambda _: NeuronTransportDistance(0, 3),
        ValueError,
        ("`num_student_neurons`", "positive"),
    ),
    (
        "metric of any cost",
        lambda _: NeuronTransportDistance(4, 6, cost=dot),
        TypeError,
        ("`cost`", "transport_distance("),
    ),
    ("metric transposed", lambda _: update(Y.T, X.T), ValueError, ("4 neurons", "(8, 4)", "Transpose it")),
    ("metric of NaN", lambda _: update(Y, X * NAN), ValueError, ("`teacher` has 48 NaN",)),
    ("metric of unpaired", lambda _: update(Y[:, :3], X), ValueError, ("(4, 3)", "(6, 8)", "one to one")),
    ("metric's plan too early", lambda _: NeuronTransportDistance(4, 6).transport(), ValueError, ("`update` first",)),
]


def dot(y: Tensor, x: Tensor) -> Tensor:
    return y @ x.mT - 5


def row(y: Tensor, x: Tensor) -> Tensor:
    return (y[0] - x[0]).abs()


def stopped(y: Tensor, x: Tensor) -> Tensor:
    return torch.cdist(y.detach(), x)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize(
    ("call", "error", "words"), [case[1:] for case in ARGUMENTS], ids=[case[0] for case in ARGUMENTS]
)
def test_arguments(call: Call, error: Error, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(error) as raised:
        call(tmp_path)
    assert type(raised.value) is error
    told(raised.value, words)


# Fits: mistakes that show when student and teacher meet


class Special(nn.Module):
    """A convolution whose output is made into something else."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.make = nn.Conv2d(1, 4, 3, padding=1), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.conv(x))


class SpecialNet(Net):
    """With a layer that gives something unusual, of which the outputs of the network do not depend."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.special = Special(make)
        self.parts = nn.ModuleList([nn.Linear(8, 8)])
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.special(x)
        return self.head(self.parts[0](self.block2(F.max_pool2d(self.block1(x), 2)).mean((2, 3))))


def special(make: Callable[[Tensor], Any] = torch.relu) -> Callable[[], Task]:
    return lambda: with_net(SpecialNet, make)


def with_net(kind: Callable[..., nn.Module], *args: Any, task: type[Task] = Task) -> Task:
    module = make_task(task)
    module.net = seeded(0, kind, *args)
    return module


class TwiceNet(Net):
    """Runs one ReLU twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2[2](self.block2(F.max_pool2d(self.block1(x), 2))).mean((2, 3)))


class EvaluationNet(Net):
    """Runs its first block as a whole in evaluation mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1[0](x) if self.training else self.block1(x)
        return self.head(self.block2(F.max_pool2d(x, 2)).mean((2, 3)))


class Grid(nn.Module):
    """Channels-last maps, the second of which no module tells from channels-first ones."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.norm, self.gate = nn.Linear(1, width), nn.LayerNorm(width), Gate()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(self.norm(self.embed(x.permute(0, 2, 3, 1)))).mean((1, 2)))


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


class Tokens(nn.Module):
    """Tokens (B, T, C), one for each patch of an image; a square of them, or a row."""

    def __init__(self, patch: tuple[int, int] = (2, 2), width: int = 8) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(1, width, patch, patch), nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x).flatten(2).mT).mean(1))


class Video(nn.Module):
    """Volumes (B, C, T, H, W)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv3d(1, width, 3, padding=1), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x[:, :, None].expand(-1, -1, 3, -1, -1)).mean((2, 3, 4)))


class Unhooked(Task):
    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net.forward(batch[0]), batch[1])


class WithoutGradient(Task):
    def loss(self, batch: list[Tensor]) -> Tensor:
        with torch.no_grad():
            features = self.net(batch[0])
        return F.cross_entropy(features + self.net.head.bias, batch[1])


class BareBackward(Task):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


class NoLoss(Task):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return {"loos": self.loss(batch)}


class Replacing(pl.Callback):
    """Puts another training step in the place of ours when the fit has begun."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        own = type(pl_module).training_step.__get__(pl_module)

        def training_step(batch: list[Tensor], batch_idx: int) -> Any:
            return own(batch, batch_idx)

        pl_module.training_step = training_step

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        del pl_module.training_step


class OddStrategy(Strategy):
    """One with which the package was never run."""

    root_device = torch.device("cpu")
    global_rank = local_rank = node_rank = 0
    world_size = 1
    is_global_zero = True

    def barrier(self, name: str | None = None) -> None: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def all_reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    def model_to_device(self) -> None: ...


def own_net(task: Task) -> nn.Module:
    return task.net


def sharing(task: Task) -> nn.Module:
    teacher = make_teacher(4)
    teacher.block1 = task.net.block1
    return teacher


def spoilt(name: str, value: float) -> Callable[[Task], nn.Module]:
    """A teacher with one bad parameter."""

    def build(task: Task) -> nn.Module:
        teacher = make_teacher()
        teacher.get_parameter(name).data.fill_(value)
        return teacher

    return build


def spoilt_task() -> Task:
    task = make_task()
    task.net.block2[0].weight.data.fill_(NAN)
    return task


def frozen(*names: str) -> Callable[[], Task]:
    def build() -> Task:
        task = make_task()
        for name in names:
            task.get_submodule(name).requires_grad_(False)
        return task

    return build


def batches(*sizes: int) -> DataLoader[Any]:
    """Batches of these sizes."""
    return DataLoader([[part[:size] for part in make_data().tensors] for size in sizes], batch_size=None)


ALL = ("callback", "wrapper", "plain")
TRAINED = ("callback", "wrapper")


@dataclass(frozen=True)
class Fit:
    """One fit. What is not given is right."""

    name: str
    error: Error = Exception
    words: tuple[str, ...] = ()
    layers: Any = field(default_factory=lambda: dict(LAYERS))
    options: dict[str, Any] = field(default_factory=dict)
    task: Callable[[], Task] = make_task
    teacher: Callable[[Task], nn.Module] = lambda task: make_teacher()
    data: Callable[[], Any] = lambda: loader(16)
    trainer: Callable[[], dict[str, Any]] = dict
    others: Callable[[], list[pl.Callback]] = list
    ways: tuple[str, ...] = ALL

    def run(self, way: str, task: Task, teacher: Any) -> RepresentationTransfer:
        """Train in one of the three ways; everything that is built is built here, as in a user's script."""
        options = {"weight": 2.0, **self.options}
        if way == "plain":
            return self._run_plainly(task, RepresentationTransfer(teacher, self.layers, **options))
        if way == "wrapper":
            module = OTRTModule(task, teacher, self.layers, **options)
            callbacks, transfer = self.others(), module.otrt
        else:
            added = OTRTCallback(teacher, self.layers, **options)
            module, callbacks, transfer = task, [added, *self.others()], added.transfer
        KEPT.append(transfer)
        make_trainer(**{"callbacks": callbacks, "max_epochs": 1, **self.trainer()}).fit(module, self.data())
        return transfer

    def _run_plainly(self, task: Task, transfer: RepresentationTransfer) -> RepresentationTransfer:
        KEPT.append(transfer)
        optimizer = task.configure_optimizers()
        with transfer.attached(task):
            for batch in self.data():
                optimizer.zero_grad()
                (task.loss(batch) + transfer.loss()).backward()
                optimizer.step()
        return transfer


#: The transfers of a test, also of fits that failed.
KEPT: list[RepresentationTransfer] = []


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    KEPT.clear()


def named(layer: str, teacher: str = "block1", **options: Any) -> Any:
    return [LayerPair(layer, teacher, **options)] if options else {layer: teacher}


def kind_of(output: str, make: Callable[[Tensor], Any], *words: str) -> Fit:
    """A student layer that gives no representation."""
    expected = ("Student layer 'net.special' (Special)", *words)
    return Fit(f"output {output}", ValueError, expected, layers=named("net.special"), task=special(make))


MISTAKES = [
    # The choice of layers
    Fit(
        "student layer misspelt",
        ValueError,
        (
            "No layer 'net.blok1' in the student (Task)",
            "Did you mean 'net.block1'",
            "Available at this depth: 'net.block1'",
        ),
        layers=named("net.blok1"),
    ),
    Fit(
        "teacher layer misspelt",
        ValueError,
        ("No layer 'blok1' in the teacher (Net)", "Did you mean 'block1'", "Available at this depth"),
        layers=named("net.block1", "blok1"),
    ),
    Fit(
        "sides swapped",
        ValueError,
        ("No layer 'net.block1' in the teacher (Net)", "exists in the student", "the two sides may be swapped"),
        layers=named("block1", "net.block1"),
    ),
    Fit(
        "glob without match",
        ValueError,
        ("Pattern 'net.layer*' matches no layer of the student (Task)", "do not match across dots", "'net.block1'"),
        layers=named("net.layer*"),
    ),
    Fit(
        "regex without match",
        ValueError,
        ("Regex 're:layer.' matches no layer of the teacher (Net)", "must match the whole name", "'block1'"),
        layers=named("net.block1", "re:layer."),
    ),
    Fit(
        "regex invalid",
        ValueError,
        ("Invalid regex 'net.('", "unterminated subpattern at position 4", "leave out 're:'"),
        layers=named("re:net.("),
    ),
    Fit(
        "different counts",
        ValueError,
        ("2 student layers but 1 teacher", "Student: 'net.block1', 'net.block2'", "Teacher: 'block1'", "Narrow"),
        layers=named("net.block?"),
    ),
    Fit(
        "index too low",
        ValueError,
        ("Index -30", "in the student", "10 recordable layers", "[-10, 9]"),
        layers={-30: -1},
    ),
    Fit("index too high", ValueError, ("Index 99", "in the teacher", "[-10, 9]"), layers={"net.block1": 99}),
    Fit(
        "duplicate pair",
        ValueError,
        ("'net.block1' -> 'block1' is named twice", "double its weight", "Remove one"),
        layers=[("net.block1", "block1"), "block1"],
    ),
    Fit("empty mapping", ValueError, ("at least one layer pair", "got {}", '"auto"'), layers={}),
    Fit("empty list", ValueError, ("at least one layer pair", "got []", '"auto"'), layers=[]),
    Fit("no layers", TypeError, ("a name, an index, a pair", "None of type NoneType"), layers=None),
    Fit("module for a name", TypeError, ("a name, an index", "of type ReLU"), layers={nn.ReLU(): "block1"}),
    Fit("three in a pair", TypeError, ("a pair (student, teacher)", "of type tuple"), layers=[("a", "b", "c")]),
    Fit("word on one side", ValueError, ('"auto" chooses the layers of both sides', "by itself"), layers=named("auto")),
    Fit(
        "parameter",
        ValueError,
        ("'net.block1.0.weight'", "Parameter of shape (4, 1, 3, 3), not a module", "Name the module that owns it"),
        layers=named("net.block1.0.weight"),
    ),
    Fit(
        "container never called",
        ValueError,
        ("'net.parts' (ModuleList)", "a container that is never called", "Hook a child: 'net.parts.0'"),
        layers=named("net.parts"),
        task=special(),
    ),
    Fit(
        "layer that does not run",
        ValueError,
        ("'net.unused' (Linear)", "did not run in this forward", "Likely causes", "Hook a layer that runs"),
        layers=named("net.unused"),
        task=special(),
    ),
    Fit(
        "layer that runs in evaluation alone",
        RuntimeError,
        ("student layer 'net.block1' did not run in this forward", "skipped in training", "choose a layer"),
        task=lambda: with_net(EvaluationNet),
    ),
    Fit(
        "layer that runs twice",
        ValueError,
        ("'net.block2.2' (ReLU)", "ran 2 times in one forward", "such as 'net.block2'"),
        layers=named("net.block2.2"),
        task=lambda: with_net(TwiceNet),
    ),
    Fit(
        "layer outside the root",
        ValueError,
        (
            "'net.unused' (Linear) did not run: the forward of 'net.parts.0' was traced, and it lies outside",
            "`student_root`",
        ),
        layers=named("net.unused", "0"),
        options={"student_root": "net.parts.0"},
        task=special(),
        teacher=lambda task: seeded(1, nn.Sequential, nn.Linear(8, 8)),
    ),
    Fit(
        "root misspelt",
        ValueError,
        ("`student_root`", "the student (Task)", "'nett'", "Its children: ['net']"),
        options={"student_root": "nett"},
    ),
    Fit(
        "layers before all that is trained",
        RuntimeError,
        ("term is constant", "['net.block1:input']", "requires a gradient", "Unfreeze the layers, choose others"),
        layers=named("net.block1:input"),
    ),
    # What layers give
    kind_of("a tuple", lambda y: (y, y), "tuple(Tensor, Tensor)", "LayerPair(..., select=0)", "[0, 1]"),
    kind_of("a dictionary", lambda y: {"a": y, "b": 1}, "dict(a, b)", "LayerPair(..., select='a')"),
    kind_of("a list of boxes", lambda y: [{"boxes": y}], "list(dict)", "holds no tensor to record"),
    kind_of("a string", lambda y: "words", "returns str", "holds no tensor to record"),
    kind_of("integers", lambda y: y.argmax(1), "int64 of shape (8, 8, 8)", "a real floating-point tensor"),
    kind_of("booleans", lambda y: y > 0, "bool of shape (8, 4, 8, 8)", "a real floating-point tensor"),
    kind_of("complex", lambda y: torch.complex(y, y), "complex64 of shape (8, 4, 8, 8)", "a real floating-point"),
    kind_of("0-D", lambda y: y.mean(), "float32 of shape ()", "(batch, neurons, ...)", "Hook an earlier layer"),
    kind_of("1-D", lambda y: y.mean((1, 2, 3)), "float32 of shape (8,)", "(batch, neurons, ...)"),
    Fit(
        "teacher output of integers",
        ValueError,
        ("Teacher layer 'special' (Special)", "int64 of shape (8, 8, 8)", "a real floating-point tensor"),
        layers=named("net.block1", "special"),
        teacher=lambda task: seeded(1, SpecialNet, lambda y: y.argmax(1)),
    ),
    Fit(
        "teacher output of a dictionary",
        ValueError,
        ("Teacher layer 'special' (Special)", "dict(a)", "LayerPair(..., select='a')"),
        layers=named("net.block1", "special"),
        teacher=lambda task: seeded(1, SpecialNet, lambda y: {"a": y}),
    ),
    Fit(
        "output with ambiguous axes",
        ValueError,
        ("Student layer 'net.gate' (Gate) of shape (8, 8, 8, 8)", "ambiguous neuron axis", "1 for (B, C, ...), -1 for"),
        layers=named("net.gate", "gate"),
        task=lambda: with_net(Grid),
        teacher=lambda task: seeded(1, Grid),
    ),
    Fit(
        "neuron axis that of the samples",
        ValueError,
        ("'net.block1' (Sequential)", "(8, 4, 8, 8)", "`neuron_axis` 0 is the axis of the samples"),
        layers=named("net.block1", neuron_axis=0),
    ),
    Fit(
        "neuron axis out of range",
        ValueError,
        ("'net.block1' (Sequential)", "[-4, 3]", "got 9"),
        layers=named("net.block1", neuron_axis=9),
    ),
    Fit(
        "select what is not there",
        ValueError,
        ("'net.special' (Special)", "without a tensor at select='c'", "among ['a', 'b']"),
        layers=named("net.special", select="c"),
        task=special(lambda y: {"a": y, "b": y}),
    ),
    Fit(
        "select from a tensor",
        ValueError,
        ("select='a' chooses nothing for 'net.block1' -> 'block1'", "Remove `select`"),
        layers=named("net.block1", select="a"),
    ),
    Fit(
        "samples folded into the batch",
        ValueError,
        ("'net.special' -> 'block1'", "batch sizes differ", "(32, 4, 4, 4)", "(8, 6, 4, 4)", "fold positions"),
        layers=named("net.special", neuron_axis=1),
        task=special(lambda y: y.flatten(0, 1)[:, None].expand(-1, 4, -1, -1)),
    ),
    Fit(
        "map with a sequence",
        ValueError,
        ("'net.block1' -> 'special'", "positions cannot be paired", "one side is a map and the other a sequence"),
        layers=named("net.block1", "special", neuron_axis=1),
        teacher=lambda task: seeded(1, SpecialNet, lambda y: y.flatten(2)),
    ),
    Fit(
        "grid of tokens with a row of tokens",
        ValueError,
        ("'net.norm' -> 'norm'", "positions cannot be paired", "one side is a map and the other a sequence"),
        layers=named("net.norm", "norm"),
        task=lambda: with_net(Tokens),
        teacher=lambda task: seeded(1, Tokens, (8, 1)),
    ),
    Fit(
        "no classification head",
        ValueError,
        ("No classification head", "the teacher (Sequential)", "Name the layer"),
        layers="penultimate",
        teacher=lambda task: seeded(1, nn.Sequential, nn.Conv2d(1, 4, 3), nn.ReLU()),
    ),
    Fit(
        "two widths for the identity",
        ValueError,
        ('plan="identity"', "'net.block1' -> 'block1' has 4 student and 6 teacher", 'Use plan="sinkhorn"'),
        options={"plan": "identity"},
    ),
    # Inputs of the teacher
    Fit(
        "fewer samples for the teacher",
        ValueError,
        ("'net.block1' -> 'block1'", "batch sizes differ", "(8, 4, 4, 4)", "(4, 6, 4, 4)", "Check `teacher_inputs`"),
        options={"teacher_inputs": lambda x: x[:4]},
    ),
    Fit("adapter of nothing", TypeError, ("`teacher_inputs`", "NoneType"), options={"teacher_inputs": lambda x: None}),
    Fit("adapter of a list", TypeError, ("list", "in a tuple, `(images,)`"), options={"teacher_inputs": lambda x: [x]}),
    Fit(
        "inputs that the teacher cannot take",
        RuntimeError,
        ("The teacher (Net) failed on (float32 (8, 64))", "from the inputs of 'net'", "conv2d", "`teacher_inputs`"),
        options={"teacher_inputs": lambda x: x.flatten(1)},
    ),
    Fit(
        "root that gets features",
        RuntimeError,
        ("(float32 (8, 4, 4, 4)), from the inputs of 'net.block2' of the student (Task)", "`student_root`"),
        layers=named("net.block2", "block2"),
        options={"student_root": "net.block2"},
    ),
    # Values
    Fit(
        "batch of one for vectors",
        ValueError,
        (
            "'net.dropout:input' -> 'dropout:input' has 1 observations",
            "fewer than 3",
            "larger batch",
            "cost='euclidean'",
        ),
        layers="penultimate",
        data=lambda: batches(1, 1),
    ),
    Fit(
        "batch of none",
        ValueError,
        ("'net.block1' -> 'block1' has 0 observations", "fewer than 3", "larger batch"),
        data=lambda: batches(0, 0),
    ),
    Fit(
        "NaN in the teacher",
        ValueError,
        ("Teacher layer 'block2' has 1536 NaN or infinite values of 1536", "Check its inputs and its weights"),
        teacher=spoilt("block2.0.weight", NAN),
    ),
    Fit(
        "infinity in the teacher",
        ValueError,
        ("Teacher layer 'block1' has 768 NaN or infinite values of 768", "(6, 128)"),
        teacher=spoilt("block1.1.bias", INF),
    ),
    Fit(
        "NaN in the student at the start",
        ValueError,
        ("Student layer 'net.block2' has 1024 NaN", "(8, 128)", "Check its inputs and its weights"),
        task=spoilt_task,
    ),
    Fit("negative costs", ValueError, ("not to be negative", "add a constant"), options={"cost": dot}),
    Fit(
        "cost of NaN",
        ValueError,
        ("NaN or infinite values of 24",),
        options={"cost": lambda y, x: torch.cdist(y, x) * NAN},
    ),
    Fit("cost that stops gradients", ValueError, ("no gradient", "torch operations"), options={"cost": stopped}),
    Fit(
        "schedule of nothing",
        ValueError,
        ("`schedule`", "None at step 0", "factor"),
        options={"schedule": lambda s: None},
    ),
    Fit("schedule of NaN", ValueError, ("`schedule`", "nan at step 0"), options={"schedule": lambda s: NAN}),
    Fit("schedule of tensors", ValueError, ("tensor(1.)", "step 0"), options={"schedule": lambda s: torch.tensor(1.0)}),
    Fit("schedule below zero later", ValueError, ("-1 at step 1",), options={"schedule": lambda s: 1 if s < 1 else -1}),
    # The teacher
    Fit("teacher the student", ValueError, ("the student itself", "copy.deepcopy(student)"), teacher=lambda task: task),
    Fit("teacher in the student", ValueError, ("submodule 'net' of the student", "deepcopy"), teacher=own_net),
    Fit(
        "teacher sharing parameters",
        ValueError,
        ("shares 'block1.0.weight' with the student, where it is 'net.block1.0.weight'", "copy.deepcopy(teacher)"),
        teacher=sharing,
    ),
    Fit(
        "teacher on meta",
        ValueError,
        ("'block1.0.weight' of the teacher is on the meta device", "materialise"),
        teacher=lambda task: make_teacher().to("meta"),
    ),
    # The step and the Trainer
    Fit(
        "student not called",
        RuntimeError,
        ("No forward of a module that holds the layers of the student (Unhooked)", "not `.forward`", "`student_root`"),
        task=lambda: make_task(Unhooked),
    ),
    Fit(
        "root not called",
        RuntimeError,
        ("No forward of the root 'net' of the student (Unhooked)", "not `.forward`", "layers={'net.block1'"),
        task=lambda: make_task(Unhooked),
        options={"student_root": "net"},
    ),
    Fit(
        "student called without gradient",
        RuntimeError,
        ("the student (WithoutGradient)", "with gradient"),
        task=lambda: make_task(WithoutGradient),
    ),
    Fit(
        "recorded layers frozen",
        RuntimeError,
        ("term is constant", "['net.block1']", "Unfreeze the layers", "`no_grad`"),
        layers=named("net.block1"),
        task=frozen("net.block1"),
    ),
    Fit(
        "student frozen",
        RuntimeError,
        ("No parameter of the student (Task) requires a gradient", "Unfreeze"),
        task=frozen("net"),
    ),
    Fit(
        "manual optimization with a bare backward",
        MisconfigurationException,
        ("BareBackward uses manual optimization", "`self.manual_backward(loss)`", "instead of `loss.backward()`"),
        task=lambda: make_task(BareBackward),
        ways=TRAINED,
    ),
    Fit(
        "dictionary without loss",
        MisconfigurationException,
        ("'loss' key needs to be present",),
        task=lambda: make_task(NoLoss),
        ways=TRAINED,
    ),
    Fit(
        "training step replaced in the fit",
        MisconfigurationException,
        ("`training_step` of Task was replaced after the fit began", "Replace it before `trainer.fit`"),
        others=lambda: [Replacing()],
        ways=TRAINED,
    ),
    Fit(
        "strategy never run",
        MisconfigurationException,
        ("OddStrategy was never run with representation transfer", 'strategy="ddp"', "strict=False to try"),
        trainer=lambda: {"strategy": OddStrategy()},
        ways=TRAINED,
    ),
    Fit(
        "the same callback twice",
        RuntimeError,
        ("more than one stateful callback of type `OTRTCallback`", "`callback.state_key` must be unique"),
        others=lambda: [OTRTCallback(make_teacher(), dict(LAYERS))],
        ways=("callback",),
    ),
]


def state_of(*modules: nn.Module) -> list[Any]:
    """All that a failed fit must give back of a teacher."""
    return [
        (
            {name: None if t.is_meta else (t.dtype, t.numpy().tobytes()) for name, t in module.state_dict().items()},
            {name: part.training for name, part in module.named_modules()},
            {name: (parameter.requires_grad, parameter.grad is None) for name, parameter in module.named_parameters()},
        )
        for module in modules
    ]


def assert_nothing_left(task: Task, teacher: nn.Module) -> None:
    assert not hooks(task, teacher)
    assert not {"training_step", "manual_backward"} & set(task.__dict__)
    assert torch.is_grad_enabled()
    for transfer in KEPT:
        assert not transfer.is_attached
        assert not transfer.recorded_samples


@cache
def untroubled(way: str) -> dict[str, Tensor]:
    """Weights after a fit without any mistake before it."""
    task = make_task()
    Fit("right").run(way, task, make_teacher())
    return weights(task)


@pytest.mark.parametrize(
    ("case", "way"), [pytest.param(case, way, id=f"{case.name}, {way}") for case in MISTAKES for way in case.ways]
)
def test_mistakes_in_fits(case: Fit, way: str) -> None:
    task = case.task()
    teacher = case.teacher(task)
    before = [] if teacher is task else state_of(teacher)
    start = {name: value.clone() for name, value in task.state_dict().items()}
    with pytest.raises(case.error) as raised:
        case.run(way, task, teacher)
    assert type(raised.value) is case.error
    told(raised.value, case.words)
    assert_nothing_left(task, teacher)
    assert before == ([] if teacher is task else state_of(teacher))

    # Mended: what was not the mistake is used again.
    blank = Fit("")
    task = task if case.task is make_task else make_task()
    task.load_state_dict(start if case.task is make_task else task.state_dict())
    teacher = teacher if case.teacher is blank.teacher else make_teacher()
    transfer = blank.run(way, task, teacher)
    assert [(pair.student, pair.teacher) for pair in transfer.pairs] == list(LAYERS.items())
    assert_same(weights(task), untroubled(way))
    assert_nothing_left(task, teacher)


# Plain PyTorch: the order of calls


def plain(**options: Any) -> RepresentationTransfer:
    KEPT.append(RepresentationTransfer(make_teacher(), **{"layers": {"block1": "block1"}, **options}))
    return KEPT[-1]


def calls(*steps: Callable[[RepresentationTransfer, nn.Module], Any], **options: Any) -> None:
    transfer, student = plain(**options), seeded(0, Net)
    with transfer.attached(student):
        for step in steps:
            step(transfer, student)


def twice_differentiated(transfer: RepresentationTransfer, student: nn.Module) -> None:
    student(IMAGES)
    parameters = list(student.block1.parameters())
    gradients = torch.autograd.grad(transfer.loss(), parameters, create_graph=True)
    sum(gradient.square().sum() for gradient in gradients).backward()


def two_students() -> None:
    transfer = plain()
    for width in (4, 5):
        student = seeded(0, Net, width)
        with transfer.attached(student):
            one_step(transfer, student)


def other_state(transfer: RepresentationTransfer, student: nn.Module) -> None:
    first, same = plain(layers={"block2": "block2"}), seeded(0, Net)
    with first.attached(same):
        one_step(first, same)
    transfer.load_state_dict(first.state_dict())


def one_step(transfer: RepresentationTransfer, student: Any) -> None:
    student(IMAGES)
    transfer.loss()


def forward(transfer: RepresentationTransfer, student: nn.Module) -> None:
    student(IMAGES)


def forward_without_gradient(transfer: RepresentationTransfer, student: nn.Module) -> None:
    with torch.no_grad():
        student(IMAGES)


def loss(transfer: RepresentationTransfer, student: nn.Module) -> None:
    transfer.loss()


def attach(transfer: RepresentationTransfer, student: nn.Module) -> None:
    transfer.attach(student)


ORDERS: list[tuple[str, Callable[[], Any], Error, tuple[str, ...]]] = [
    (
        "loss outside",
        lambda: plain().loss(),
        RuntimeError,
        ("`loss` needs an attached student", "transfer.attached(student)"),
    ),
    (
        "loss before forward",
        lambda: calls(loss),
        RuntimeError,
        ("No forward", "student (Net)", "layers={'block1': 'block1'}"),
    ),
    (
        "loss twice",
        lambda: calls(one_step, loss),
        RuntimeError,
        ("not called with gradient since the last call", "once per loss"),
    ),
    ("loss of no_grad", lambda: calls(forward_without_gradient, loss), RuntimeError, ("No forward", "with gradient")),
    (
        "attached twice",
        lambda: calls(attach),
        RuntimeError,
        ("attached already", "Detach it first, or use another one"),
    ),
    ("attached to nothing", lambda: plain().attach(None), TypeError, ("student to be a torch.nn.Module", "NoneType")),
    (
        "second derivative",
        lambda: calls(twice_differentiated),
        RuntimeError,
        ("differentiated only once", "gradient penalty"),
    ),
    (
        "another student",
        two_students,
        ValueError,
        ("'block1' -> 'block1' has 5 student and 6 teacher neurons", "the shape (4, 6)", "`reset()`"),
    ),
    (
        "state of other layers",
        lambda: calls(other_state, one_step),
        ValueError,
        (
            "saved with the layer pairs [('block2', 'block2')]",
            "[('block1', 'block1')]",
            "Resume with the same `layers`",
        ),
    ),
]


@pytest.mark.parametrize(("make", "error", "words"), [case[1:] for case in ORDERS], ids=[case[0] for case in ORDERS])
def test_orders_of_calls(make: Callable[[], Any], error: Error, words: tuple[str, ...]) -> None:
    with pytest.raises(error) as raised:
        make()
    told(raised.value, words)
    assert not any(hooks(transfer.teacher.module) or transfer.is_attached for transfer in KEPT)
    calls(one_step, one_step)


# Defined behaviour: what looks like a mistake and is none, with its warnings


@dataclass
class Seen:
    """What a fit did."""

    case: Fit
    task: Task
    teacher: nn.Module
    transfer: RepresentationTransfer
    logged: list[dict[str, float]]

    @property
    def terms(self) -> list[float | None]:
        """The term of each step, None for a step without."""
        return [values.get("train/otrt") for values in self.logged]

    @property
    def is_changed(self) -> bool:
        """Whether the term made a difference to the weights."""
        task = self.case.task()
        make_trainer(max_epochs=1).fit(task, self.case.data())
        return differ(weights(self.task), weights(task))


class Log(pl.Callback):
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        # The Trainer keeps what earlier steps logged.
        has_term = any(distance.plan is not None for distance in KEPT[0].distances)
        names = [name for name in trainer.logged_metrics if has_term or name == "otrt/weight"]
        self.logged.append({name: float(trainer.logged_metrics[name]) for name in names})


def dead(net: Net) -> Net:
    """Both blocks give zeros."""
    for block in (net.block1, net.block2):
        block[1].weight.data.zero_()
        block[1].bias.data.fill_(-1.0)
    return net


def dead_task() -> Task:
    task = make_task()
    dead(task.net)
    return task


class Spoiling(Task):
    """NaN in the student from the second step on."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if batch_idx == 1:
            self.net.block2[0].weight.data.fill_(NAN)
        return super().training_step(batch, batch_idx)


def spoilt_later(x: Tensor) -> Tensor:
    """Inputs that give the teacher NaN in the second batch of eight."""
    return x * NAN if torch.equal(x, make_data().tensors[0][8:16]) else x


class HeadOptimizer(Task):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.head.parameters(), lr=0.1)


class SumOfLosses(Task):
    """Defined for batches of none."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")


class NoStep(Task):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        return None


def compiled_task() -> Task:
    """Compiled and run before the fit, so that the code has no hooks in it."""
    task = make_task()
    task.net = torch.compile(task.net, backend="eager")
    task.net(IMAGES)
    return task


def check_terms(seen: Seen) -> None:
    """Each step has a term."""
    assert seen.terms
    assert all(term is not None and 0 < term < 2 for term in seen.terms), seen.terms


def check_all(seen: Seen) -> None:
    """Each step has a term, and it has an effect."""
    check_terms(seen)
    assert seen.is_changed


def check_none(seen: Seen) -> None:
    """No step has a term, and the fit is the fit without one."""
    assert seen.terms == [None] * len(seen.terms)
    assert not seen.is_changed


def check_steps(*wanted: bool) -> Callable[[Seen], None]:
    """Which steps have a term."""

    def check(seen: Seen) -> None:
        assert [term is not None for term in seen.terms] == list(wanted)
        assert seen.is_changed

    return check


def check_value(value: float, *, changed: bool) -> Callable[[Seen], None]:
    """All terms have one value."""

    def check(seen: Seen) -> None:
        assert seen.terms == pytest.approx([value] * len(seen.terms), abs=1e-3)
        assert all(tensor.isfinite().all() for tensor in weights(seen.task).values())
        assert seen.is_changed == changed

    return check


def check_two_to_one(seen: Seen) -> None:
    check_all(seen)
    parts = [seen.logged[-1][f"otrt/net.block1-{teacher}"] for teacher in ("block1", "block2")]
    assert sum(parts) / 2 == pytest.approx(seen.terms[-1])


def check_equal(seen: Seen) -> None:
    """Nothing to learn at the start, and something to keep later."""
    assert seen.terms[0] == pytest.approx(0, abs=1e-3)
    assert seen.terms[1] > 10 * seen.terms[0]
    assert seen.is_changed


def check_no_effect(seen: Seen) -> None:
    check_terms(seen)
    assert not seen.is_changed


def check_spoilt(seen: Seen) -> None:
    """NaN is left in the loss, and kept out of the plans."""
    assert [term == term for term in seen.terms] == [True, False, False]
    assert all(state["plan"].isfinite().all() for state in seen.transfer.state_dict()["engine"]["pairs"])


def check_untrained(seen: Seen) -> None:
    assert not seen.logged
    assert_same(weights(seen.task), weights(make_task()))


def check_other_callback(seen: Seen) -> None:
    check_all(seen)
    assert all("train/otrt-2" in values for values in seen.logged)


def dies(side: str, *layers: str) -> list[str]:
    return [f"{side} layer '{layer}' is constant over the first batch: all of its" for layer in layers]


DEFINED: list[tuple[Fit, list[str], Callable[[Seen], None]]] = [
    (Fit("batch of one with maps", data=lambda: batches(1, 1)), [], check_all),
    (
        Fit("batch of one, euclidean", layers="penultimate", options={"cost": "euclidean"}, data=lambda: batches(1, 1)),
        [],
        check_all,
    ),
    (Fit("smaller last batch", data=lambda: batches(8, 8, 3)), [], check_all),
    (
        Fit("last batches too small", layers="penultimate", data=lambda: batches(8, 1, 8, 1)),
        ["'net.dropout:input' -> 'dropout:input' has 1 observations, and fewer than 3 carry no correlation: the pair"],
        check_steps(True, False, True, False),
    ),
    (
        Fit(
            "all batches too small, not strict",
            layers="penultimate",
            options={"strict": False},
            data=lambda: batches(1, 1),
        ),
        ["'net.dropout:input' -> 'dropout:input' has 1 observations, and fewer than 3 carry no correlation: the pair"],
        check_none,
    ),
    (
        Fit("a batch of none later", task=lambda: make_task(SumOfLosses, norm=False), data=lambda: batches(8, 0, 8)),
        [f"'net.block{i}' -> 'block{i}' has 0 observations" for i in (1, 2)],
        check_steps(True, False, True),
    ),
    (
        Fit("empty loader", data=lambda: DataLoader([])),
        ["Total length of `DataLoader`", "Total length of `Combined"],
        check_untrained,
    ),
    (Fit("dead student", task=dead_task), dies("Student", "net.block1", "net.block2"), check_value(1, changed=False)),
    (
        Fit("dead teacher", teacher=lambda _: dead(make_teacher())),
        dies("Teacher", "block1", "block2"),
        check_value(1, changed=False),
    ),
    (
        Fit("dead on both sides", task=dead_task, teacher=lambda _: dead(make_teacher())),
        [*dies("Student", "net.block1", "net.block2"), *dies("Teacher", "block1", "block2")],
        check_value(0, changed=False),
    ),
    (
        Fit("dead teacher, euclidean", teacher=lambda _: dead(make_teacher()), options={"cost": "euclidean"}),
        [],
        check_all,
    ),
    (Fit("dead student, euclidean", task=dead_task, options={"cost": "euclidean"}), [], check_terms),
    (
        Fit("two teacher layers for one", layers=[("net.block1", "block1"), ("net.block1", "block2")]),
        [],
        check_two_to_one,
    ),
    (Fit("one teacher layer for two", layers=[("net.block1", "block1"), ("net.block2", "block1")]), [], check_all),
    (Fit("the networks themselves", layers={"net": ""}), [], check_all),
    (Fit("other sizes of maps", layers=named("net.block1", "block2")), [], check_all),
    (
        Fit(
            "other counts of tokens",
            layers=named("net.norm", "norm"),
            task=lambda: with_net(Tokens),
            teacher=lambda _: seeded(1, Tokens, (4, 4)),
        ),
        [],
        check_all,
    ),
    (
        Fit("tokens with a map", layers=named("net.norm", "block1"), task=lambda: with_net(Tokens)),
        [],
        check_all,
    ),
    (Fit("map with a vector", layers=named("net.block1", "head")), [], check_all),
    (Fit("tuple with one tensor", layers=named("net.special"), task=special(lambda y: (y, None))), [], check_all),
    (
        Fit(
            "volumes",
            layers=named("net.conv", "conv"),
            task=lambda: with_net(Video),
            teacher=lambda _: seeded(1, Video, 6),
        ),
        [],
        check_all,
    ),
    (
        Fit(
            "channels last",
            layers=named("net.norm", "norm"),
            task=lambda: with_net(Grid),
            teacher=lambda _: seeded(1, Grid, 6),
        ),
        [],
        check_all,
    ),
    (
        Fit(
            "given axis",
            layers=named("net.gate", "gate", neuron_axis=-1),
            task=lambda: with_net(Grid),
            teacher=lambda _: seeded(1, Grid),
        ),
        [],
        check_all,
    ),
    (
        Fit("teacher of the other package", layers=named("net.block1", "net.block1"), teacher=lambda _: OtherTask()),
        [],
        check_all,
    ),
    (Fit("teacher without gradient", teacher=lambda _: make_teacher().requires_grad_(False)), [], check_all),
    (
        Fit(
            "teacher equal by content",
            layers=named("net.block1"),
            teacher=lambda task: copy.deepcopy(task.net).eval(),
            task=lambda: make_task(norm=False),
        ),
        [],
        check_equal,
    ),
    (Fit("weight of zero", options={"weight": 0.0}), [], check_none),
    (
        Fit("schedule of zero throughout", options={"schedule": lambda step: 0.0}),
        ["weight of the transfer term was 0 in all 2 training steps of this fit, because `schedule`"],
        check_none,
    ),
    (
        Fit("epsilon of a uniform plan", options={"epsilon": 0.9}),
        [
            f"The transport plan of 'net.block{i}' -> 'block{i}' is nearly uniform, so that it matches almost nothing"
            for i in (1, 2)
        ],
        check_all,
    ),
    (
        Fit("one of two layers frozen", task=frozen("net.block1")),
        ["The student layers ['net.block1'] get no gradient"],
        check_all,
    ),
    (
        Fit("layers that no optimizer holds", task=lambda: make_task(HeadOptimizer)),
        ["The transfer term has no effect: it reaches the parameters ['net.block1.0.bias'"],
        check_no_effect,
    ),
    (
        Fit("NaN in the student later", task=lambda: make_task(Spoiling), data=lambda: loader(24)),
        ["1 recent values of the transfer term up to step 2 were NaN or infinite"],
        check_spoilt,
    ),
    (
        Fit("NaN in the teacher later", options={"teacher_inputs": spoilt_later}, data=lambda: loader(24)),
        ["1 recent values of the transfer term up to step 2 were NaN or infinite"],
        check_spoilt,
    ),
    (
        Fit("student not called, not strict", task=lambda: make_task(Unhooked), options={"strict": False}),
        ["No forward of a module that holds the layers of the student (Unhooked) was recorded"],
        check_none,
    ),
    (
        Fit("layer that does not run, not strict", task=lambda: with_net(EvaluationNet), options={"strict": False}),
        ["The student layer 'net.block1' did not run in this forward"],
        check_none,
    ),
    (
        Fit(
            "recorded layers frozen, not strict",
            task=frozen("net.block1"),
            layers=named("net.block1"),
            options={"strict": False},
        ),
        ["The transfer term is constant: the outputs of the student layers ['net.block1']"],
        check_none,
    ),
    (
        Fit("strategy never run, not strict", options={"strict": False}, trainer=lambda: {"strategy": OddStrategy()}),
        ["OddStrategy was never run with representation transfer"],
        check_all,
    ),
    (Fit("steps that return nothing", task=lambda: make_task(NoStep)), [], check_none),
    (
        Fit("two teachers for the same layers", others=lambda: [OTRTCallback(make_teacher(5), dict(LAYERS))]),
        [],
        check_other_callback,
    ),
    (Fit("compiled and run before the fit", task=compiled_task), [], check_all),
]


@pytest.mark.parametrize(("case", "words", "check"), DEFINED, ids=[case.name for case, _, _ in DEFINED])
def test_defined(case: Fit, words: list[str], check: Callable[[Seen], None]) -> None:
    task = case.task()
    teacher = case.teacher(task)
    before = state_of(teacher)
    log = Log()
    with heard() as messages:
        run = Fit(**{**vars(case), "others": lambda: [*case.others(), log]})
        transfer = run.run("callback", task, teacher)
    assert len(messages) == len(words), messages
    for message, word in zip(sorted(messages), sorted(words), strict=True):
        told(message, (word,))
    assert_nothing_left(task, teacher)
    assert before == state_of(teacher)
    with heard():
        check(Seen(case, task, teacher, transfer, log.logged))


@contextmanager
def heard() -> Iterator[list[str]]:
    """The warnings inside the block, but for those that are expected of other packages; complete after it."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for line, _ in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=line.removeprefix("ignore:"))
        yield messages
    messages += [str(warning.message) for warning in found]


def test_a_loss_that_is_never_asked_for() -> None:
    with heard() as messages:
        calls(forward, forward)
    [message] = messages
    told(message, ("2 forwards of the student were recorded", "`loss` was never called", "Add `transfer.loss()`"))


# Resuming


RESUMES: list[tuple[str, Fit | None, Fit | None, Error | None, tuple[str, ...]]] = [
    ("the same", Fit(""), Fit(""), None, ()),
    (
        "another weight, epsilon and rate of solving",
        Fit(""),
        Fit("", options={"weight": 9.0, "epsilon": 0.02, "solve_every": 1}),
        None,
        (),
    ),
    (
        "another plan",
        Fit(""),
        Fit("", options={"plan": "exact"}),
        ValueError,
        ("saved with plan='sinkhorn'", "plan='exact'", "Resume with the same `plan`", "load the weights alone"),
    ),
    (
        "another cost",
        Fit(""),
        Fit("", options={"cost": "euclidean"}),
        MisconfigurationException,
        ("or the cost", "plans and statistics cannot go on", "load the weights alone"),
    ),
    ("from a run without the term", None, Fit(""), None, ()),
    (
        "in a run without the term",
        Fit(""),
        None,
        None,
        ("callbacks used to create the checkpoint need to be provided",),
    ),
    (
        "other layers",
        Fit(""),
        Fit("", layers="penultimate"),
        MisconfigurationException,
        ("'net.block1", "this run has", "'penultimate'", "plans and statistics cannot go on", "load the weights alone"),
    ),
    (
        "layers that are others by their order",
        Fit("", layers=[("net.block1", "block1"), ("net.block2", "block2")]),
        Fit("", layers=[("net.block2", "block2"), ("net.block1", "block1")]),
        MisconfigurationException,
        ("`layers` or the teacher changed", "Resume with the same ones"),
    ),
    (
        "a teacher of other widths",
        Fit(""),
        Fit("", teacher=lambda _: make_teacher(7)),
        MisconfigurationException,
        ("`layers` or the teacher changed", "load the weights alone"),
    ),
]


@pytest.mark.parametrize(
    ("first", "then", "error", "words"), [case[1:] for case in RESUMES], ids=[c[0] for c in RESUMES]
)
def test_resumes(
    first: Fit | None, then: Fit | None, error: Error | None, words: tuple[str, ...], tmp_path: Path
) -> None:
    def fit(case: Fit | None, steps: int, path: Path | None = None) -> pl.Trainer:
        added = [OTRTCallback(case.teacher(task), case.layers, **{"weight": 2.0, **case.options})] if case else []
        KEPT.extend(one.transfer for one in added)
        trainer = make_trainer(callbacks=added, max_steps=steps)
        trainer.fit(task, loader(16), ckpt_path=path, weights_only=True if path else None)
        return trainer

    task = make_task()
    fit(first, 2).save_checkpoint(tmp_path / "a.ckpt")
    task = make_task()
    if error is not None:
        with heard(), pytest.raises(error) as raised:
            fit(then, 4, tmp_path / "a.ckpt")
        told(raised.value, words)
    else:
        with heard() as messages:
            assert fit(then, 4, tmp_path / "a.ckpt").global_step == 4
        assert len(messages) == len(words), messages
        told("".join(messages), words)
    assert_nothing_left(task, make_teacher())


# The other Lightning package


def other_trainer(**options: Any) -> Any:
    silent = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return other_lightning.Trainer(accelerator="cpu", max_steps=2, logger=False, **silent, **options)


OTHERS: list[tuple[str, Callable[[], Any], Callable[[Any], Any], Callable[[], nn.Module], Error, tuple[str, ...]]] = [
    (
        "Trainer and module of the other package",
        lambda: other_trainer(callbacks=[OTRTCallback(make_teacher(), dict(LAYERS))]),
        lambda task: task,
        OtherTask,
        MisconfigurationException,
        (
            "OTRTCallback is a callback of the `lightning` package",
            "one of `pytorch_lightning`",
            "import lightning as L",
        ),
    ),
    (
        "module of the other package",
        lambda: make_trainer(callbacks=[OTRTCallback(make_teacher(), dict(LAYERS))]),
        lambda task: task,
        OtherTask,
        TypeError,
        ("must be a `LightningModule`", "OtherTask"),
    ),
    (
        "Trainer of the other package",
        lambda: other_trainer(callbacks=[OTRTCallback(make_teacher(), dict(LAYERS))]),
        lambda task: task,
        make_task,
        TypeError,
        ("must be a `LightningModule`", "Task"),
    ),
    (
        "wrapped, with a Trainer of the other package",
        other_trainer,
        lambda task: OTRTModule(task, make_teacher(), dict(LAYERS)),
        make_task,
        TypeError,
        ("must be a `LightningModule`", "Task"),
    ),
]


@pytest.mark.parametrize(
    ("trainer", "wrap", "make", "error", "words"), [case[1:] for case in OTHERS], ids=[case[0] for case in OTHERS]
)
def test_the_other_lightning_package(
    trainer: Callable[[], Any],
    wrap: Callable[[Any], Any],
    make: Callable[[], nn.Module],
    error: Error,
    words: tuple[str, ...],
) -> None:
    task = make()
    with heard(), pytest.raises(error) as raised:
        trainer().fit(wrap(task), loader(16))
    told(raised.value, words)
    assert_nothing_left(task, make_teacher())
