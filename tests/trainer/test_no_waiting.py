"""A fit with the callback on a GPU: no step waits for the device.

What may wait is named in :func:`trainer.fake_gpu.fake_gpu`: it happens in the first batch, or every
``log_every_n_steps``.
"""

from __future__ import annotations

import itertools
import pkgutil
from typing import Any

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from old_versions import needs_cuda_build, needs_fake_cuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn import functional as F
from trainer.fake_gpu import BATCH, STEPS, Task, fake_cache, fake_fit, fake_gpu, images, layers_of_images, network

from lightning_otrt import LinearWarmup, LogitDistillation, OTRTCallback, OTRTModule, OTRTMonitor

pytestmark = [needs_cuda_build, needs_fake_cuda]


def check(copies: list[int]) -> None:
    """The first batch may copy, and no other one."""
    assert copies[1:] == [0] * (STEPS - 1), copies


def quick_and_slow(first: Any, *others: Any) -> list[Any]:
    """Marks for all but the first value: the rest of each table is run where slow tests are."""
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]


OPTIONS: list[dict[str, Any]] = [
    {},
    *[{"cost": cost, "memory": memory} for cost in ("correlation", "euclidean", "sqeuclidean") for memory in (0, 0.9)],
    *[{"plan": plan} for plan in ("uniform", "random", "orthogonal", "random_orthogonal", "auto")],
    {"plan": "orthogonal", "cost": "covariance"},
    {"plan": "orthogonal", "memory": 0.9},
    {"solve_every": 1},
    {"layers": "blocks", "grid": None},
    {"layers": "penultimate", "grid": 1},
    {"schedule": LinearWarmup(3)},
    {"strict": False},
    {"distillation": 1.0, "weight": 0},
]


@pytest.mark.parametrize("features", [None, "4:input"])
def test_distillation(features: str | None) -> None:
    """Soft targets, and a regression with its solve in each step."""
    with fake_gpu():
        check(fake_fit(Task(), [OTRTCallback(network(12), distillation=LogitDistillation(features=features))]))


@pytest.mark.parametrize("options", [{}, {"distillation": LogitDistillation(features="4:input")}], ids=["", "logits"])
def test_a_state_that_was_loaded_before_the_student_was_moved(options: dict[str, Any]) -> None:
    """As in a second fit with the same callback and a checkpoint: Lightning loads it before it moves the module."""
    with fake_gpu():
        task, callback = Task(), OTRTCallback(network(12), memory=0.9, **options)
        fake_fit(task, [callback])
        state = apply_to_collection(callback.state_dict(), Tensor, lambda tensor: tensor.cpu())
        callback.load_state_dict(state)
        assert {tensor.device.type for tensor in callback.transfer.engine.states[0].tensors()} == {"cpu"}
        fake_fit(task, [callback])
        assert {tensor.device.type for tensor in callback.transfer.engine.states[0].tensors()} == {"cuda"}
        assert callback.transfer.engine.calls == 2 * STEPS


@pytest.mark.parametrize("options", quick_and_slow(*OPTIONS), ids=repr)
def test_options(options: dict[str, Any]) -> None:
    with fake_gpu():
        check(fake_fit(Task(), [OTRTCallback(network(12), **options)]))


def test_identity() -> None:
    """Of layers of one width."""
    with fake_gpu():
        check(fake_fit(Task(), [OTRTCallback(network(8), plan="identity")]))


def sequences(width: int) -> nn.Sequential:
    """Two blocks of convolutions over time."""
    first, second = (nn.Sequential(nn.Conv1d(size, width, 3), nn.ReLU()) for size in (3, width))
    return nn.Sequential(first, second, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 10))


def videos(width: int) -> nn.Sequential:
    """The same over time and two axes of space."""
    first, second = (nn.Sequential(nn.Conv3d(size, width, 3), nn.ReLU()) for size in (3, width))
    return nn.Sequential(first, second, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(width, 10))


def vectors(width: int) -> nn.Sequential:
    """Layers without positions."""
    hidden = [layer for size in (768, width) for layer in (nn.Linear(size, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


LAYOUTS = [
    (sequences, lambda: torch.randn(BATCH, 3, 16)),
    (videos, lambda: torch.randn(BATCH, 3, 8, 8, 8)),
    (vectors, images),
    (layers_of_images, lambda: images().to(memory_format=torch.channels_last)),
]


@pytest.mark.parametrize("layout", quick_and_slow(*LAYOUTS), ids=lambda layout: layout[0].__name__)
def test_layouts(layout: tuple[Any, Any]) -> None:
    build, draw = layout
    with fake_gpu(), torch.device("cuda"):
        student, teacher = build(8), build(10)
    with fake_gpu():
        check(fake_fit(Task(student), [OTRTCallback(teacher)], draw))


def test_autocast() -> None:
    with fake_gpu():
        check(fake_fit(Task(), [OTRTCallback(network(12))], precision="bf16-mixed"))


TYPES = [torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("types", quick_and_slow(*itertools.product(TYPES, TYPES)), ids=str)
def test_types(types: tuple[torch.dtype, torch.dtype]) -> None:
    """Of the weights. The teacher gets inputs in its own type."""
    with fake_gpu():
        student, teacher = types
        task = Task(network(8, student))
        check(fake_fit(task, [OTRTCallback(network(12, teacher))], lambda: images().to(student)))


@pytest.mark.parametrize("trainer", quick_and_slow({"log_every_n_steps": 1}, {"accumulate_grad_batches": 2}), ids=repr)
def test_trainers(trainer: dict[str, Any]) -> None:
    with fake_gpu():
        check(fake_fit(Task(), [OTRTCallback(network(12))], **trainer))


def test_wrapper() -> None:
    with fake_gpu():
        check(fake_fit(OTRTModule(Task(), network(12)), []))


class TwoViews(Task):
    """Two forwards in a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch and of its mirror images."""
        images, labels = batch
        return F.cross_entropy(self.net(images) + self.net(images.flip(-1)), labels)


class Manual(Task):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step of the optimizer."""
        images, labels = batch
        self.manual_backward(F.cross_entropy(self.net(images), labels))
        self.optimizers().step()


@pytest.mark.parametrize("task", [TwoViews, Manual])
def test_tasks(task: type[Task]) -> None:
    with fake_gpu():
        check(fake_fit(task(), [OTRTCallback(network(12))]))


def test_monitor() -> None:
    """It reads what it logs every 50 steps. Gradients are left out, since autograd needs a driver."""
    with fake_gpu():
        check(fake_fit(Task(), [OTRTCallback(network(12)), OTRTMonitor(every_n_steps=50, gradients=False)]))


class Encoder(nn.Module):
    """A transformer on padded words, and a head on their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(20, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, words: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits."""
        x = self.words(words)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=attention_mask == 0)
        weights = attention_mask / attention_mask.sum(1, keepdim=True)
        return self.head((x * weights[..., None]).sum(1))


class Words(Task):
    """Classification of padded words."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        (words, mask), labels = batch
        return F.cross_entropy(self.net(words, attention_mask=mask), labels)


def padded_words() -> tuple[Tensor, Tensor]:
    """Words and the mask of those that are no padding."""
    lengths = torch.randint(2, 9, (BATCH, 1))
    return torch.randint(20, (BATCH, 8)), (torch.arange(8) < lengths).long()


@pytest.mark.parametrize("cost", ["correlation", pytest.param("sqeuclidean", marks=pytest.mark.slow)])
def test_padding(cost: str) -> None:
    with fake_gpu(), torch.device("cuda"):
        student, teacher = Encoder(8), Encoder(12)
    with fake_gpu():
        check(fake_fit(Words(student), [OTRTCallback(teacher, cost=cost, layers="blocks")], padded_words))


class Recurrent(nn.Module):
    """A cell that is given its first state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.cell, self.head = nn.Embedding(20, width), nn.RNNCell(width, width), nn.Linear(width, 10)

    def forward(self, words: Tensor, state: Tensor) -> Tensor:
        """The logits."""
        for word in self.words(words).unbind(1):
            state = self.cell(word, state)
        return self.head(state)


class FromZeros(Task):
    """Each batch holds new sequences."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        words, labels = batch
        return F.cross_entropy(self.net(words, torch.zeros(BATCH, 8, device=words.device)), labels)


def test_states_of_zeros() -> None:
    with fake_gpu(), torch.device("cuda"):
        student, teacher = Recurrent(8), Recurrent(12)
    with fake_gpu():
        callback = OTRTCallback(teacher, layers={"head:input": "head:input"})
        check(fake_fit(FromZeros(student), [callback], lambda: torch.randint(20, (BATCH, 4))))


#: Samples of each batch that are known: none, all, a part, and all but one.
KNOWN = [0, 0, BATCH, 5, BATCH - 1]


@pytest.mark.parametrize(
    "options", quick_and_slow({"distillation": 1.0}, {}, {"cost": "sqeuclidean", "memory": 0.9}), ids=repr
)
def test_teacher_cache(options: dict[str, Any]) -> None:
    """Hash, teacher's run on new samples, and the batch put together; the lookup on the host waits."""
    with fake_gpu(), fake_cache(KNOWN) as events:
        check(fake_fit(Task(), [OTRTCallback(network(12), teacher_cache="memory", **options)]))
    assert [int(event) for event in events if event.isdigit()] == [BATCH - known for known in KNOWN if known < BATCH]
    assert events.count("hash") == STEPS
    assert events.count("look") >= STEPS


class Named(nn.Module):
    """Gets the names of the files, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = network(width)

    def forward(self, x: Tensor, names: list[str]) -> Tensor:
        """The logits."""
        assert len(x) == len(names)
        return self.net(x)


class NamedImages(Task):
    """The batch goes to the network as it is."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        (images, names), labels = batch
        return F.cross_entropy(self.net(images, names), labels)


def test_teacher_cache_of_images_with_names() -> None:
    with fake_gpu(), fake_cache(KNOWN) as events:
        callback = OTRTCallback(Named(12), teacher_cache="memory")
        check(fake_fit(NamedImages(Named(8)), [callback], lambda: (images(), [f"{i}.png" for i in range(BATCH)])))
    assert [int(event) for event in events if event.isdigit()] == [BATCH - known for known in KNOWN if known < BATCH]


@pytest.mark.slow
def test_teacher_cache_of_padded_words() -> None:
    with fake_gpu(), torch.device("cuda"):
        student, teacher = Encoder(8), Encoder(12)
    with fake_gpu(), fake_cache(KNOWN):
        check(fake_fit(Words(student), [OTRTCallback(teacher, layers="blocks", teacher_cache="memory")], padded_words))


def test_what_waits_raises() -> None:
    """Lightning reads what its progress bar shows in each step."""

    class Logs(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, prog_bar=True)
            return loss

    with fake_gpu(), pytest.raises(DataDependentOutputException):
        fake_fit(Logs(), [])


def test_copies_are_counted() -> None:
    class Logs(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("number", 1.0)
            return super().training_step(batch, batch_idx)

    with fake_gpu():
        assert fake_fit(Logs(), [])[1:] == [1] * (STEPS - 1)


#: Functions on the path of each step, in which a read of a value is planted.
PLACES = [
    "trainer.transfer_term.TransferTerm._log",
    "transport.correlation.CorrelationCost.value",
    "reading.neurons.reader.pool",
    "reading.hooks.views.match_positions",
    "reading.hooks.layer_hooks.select_tensor",
    "reading.hooks.layer_hooks.ReadOutput.read",
    "teacher.frozen.frozen_teacher._cast",
    "weights.factor_at",
    "steps.term_engine.attach_gradients",
    "steps.term_engine.solve_plans",
    "steps.term_engine.TermEngine._total",
    "steps.coupling.Coupling.value",
    "steps.entropic_coupling.EntropicCoupling.solve",
    "steps.entropic_coupling.sinkhorn_plan",
    "transport.moments.norms",
    "transport.correlation.product",
    "trainer.transfer_term.TransferTerm.discard",
]


#: Those of a step with a cache.
CACHE_PLACES = [
    "teacher.cache.sample_hash.SampleHash._hash_blocks",
    "teacher.cache.sample_cache.select_samples",
    "teacher.cache.cached_run.CachedRun._fill",
    "teacher.cache.cached_run._as_tensors",
    "teacher.cache.cached_run._put",
]


@pytest.mark.parametrize("place", [*quick_and_slow(*PLACES), *quick_and_slow(*CACHE_PLACES)])
def test_a_read_in_any_place_is_found(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, _, name = f"lightning_otrt.{place}".rpartition(".")
    owner = pkgutil.resolve_name(where)
    function, reached = getattr(owner, name), []

    def reads(*args: Any, **kwargs: Any) -> Any:
        reached.append(place)
        torch.ones((), device="cuda").item()
        return function(*args, **kwargs)

    with fake_gpu(), fake_cache(KNOWN):
        callback = OTRTCallback(network(12), teacher_cache="memory" if place in CACHE_PLACES else None)
        monkeypatch.setattr(owner, name, reads)
        with pytest.raises((DataDependentOutputException, RuntimeError)) as error:
            fake_fit(Task(), [callback])
    # While the teacher runs, what it raises is wrapped in an error that names the teacher.
    found = error.value if isinstance(error.value, DataDependentOutputException) else error.value.__cause__
    assert isinstance(found, DataDependentOutputException)
    assert reached
