"""Fits with ``teacher_cache``: the losses are those without it, and the teacher runs once for each sample."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import (
    LAYERS,
    Net,
    Task,
    forwards,
    loader,
    make_data,
    make_task,
    make_teacher,
    make_trainer,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_otrt import FixedViews, OTRTCallback, OTRTModule, RepresentationTransfer, TeacherCache, TransferWarning

#: Samples and batches of an epoch, and forwards of the first one: the trace, two that show how maps lie, the whole
#: batch twice, and its parts.
SAMPLES, BATCHES, FIRST = 32, 4, 7


class Values(pl.Callback):
    """The term of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train/otrt"]))


def fit(
    cache: Any = None,
    *,
    teacher: nn.Module | None = None,
    task: Task | None = None,
    data: Any = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[list[float], OTRTCallback]:
    """The terms of two epochs and the callback."""
    torch.manual_seed(0)
    callback = OTRTCallback(
        make_teacher() if teacher is None else teacher,
        **{"layers": LAYERS, "weight": 2.0, **options},
        teacher_cache=cache,
    )
    noted = Values()
    make_trainer(**{"max_epochs": 2, "callbacks": [callback, noted], **(trainer or {})}).fit(
        make_task() if task is None else task, loader(SAMPLES, shuffle=True) if data is None else data
    )
    return noted.values, callback


def assert_same_values(found: list[float], expected: list[float], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected) > 0
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.fixture(params=["memory", "1MB", "folder"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "kept") if request.param == "folder" else request.param


OPTIONS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "euclidean": {"cost": "euclidean"},
    "squared": {"cost": "sqeuclidean", "plan": "exact"},
    "static": {"plan": "static"},
    "random": {"plan": "random"},
    "a running cost": {"memory": 0.9, "solve_every": 1},
    "the last layer": {"layers": "penultimate"},
    "chosen layers": {"layers": "auto"},
    "all positions": {"grid": None},
    "a part of the student": {"layers": ["block1", "block2"], "student_root": "net"},
    "its method": {"layers": ["block1", "block2"], "student_root": "net:forward"},
    "a copied teacher": {"teacher_dtype": "float64"},
    "an adapter": {"teacher_inputs": lambda x: (x * 0.5,)},
    "a layer twice": {"layers": [("net.block1", "block2"), ("net.block2", "block2")]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_are_those_without_it(name: str) -> None:
    expected, _ = fit(**OPTIONS[name])
    teacher = make_teacher()
    # A deep copy would copy the counting, too.
    with nullcontext([]) if "copied" in name else forwards(teacher) as count:
        found, callback = fit("memory", teacher=teacher, **OPTIONS[name])
    assert_same_values(found, expected)
    first = FIRST - 2 if name == "the last layer" else FIRST  # which gives no maps
    assert len(count) == (0 if "copied" in name else first + BATCHES - 1)
    transfer_cache = callback.transfer.cache
    assert (transfer_cache.hits, transfer_cache.misses) == (SAMPLES, SAMPLES)


def test_each_place(cache: str) -> None:
    expected, _ = fit()
    found, callback = fit(cache)
    assert_same_values(found, expected)
    assert callback.transfer.cache.hits == SAMPLES
    assert callback.teacher_cache == cache


def test_bfloat16(tmp_path: Path) -> None:
    expected, _ = fit()
    for options in (TeacherCache(dtype="bfloat16"), TeacherCache(str(tmp_path), dtype="bfloat16")):
        found, callback = fit(options)
        assert_same_values(found[:BATCHES], expected[:BATCHES])
        assert_same_values(found, expected, tolerance=1e-2)
        store = callback.transfer.cache.store
        assert store.bytes / store.samples < 0.6 * 4 * (6 * 16 + 12 * 16) + 24


@pytest.mark.parametrize("way", ["wrapper", "plain loop"])
def test_the_other_ways_in(way: str) -> None:
    expected, _ = fit(data=loader(SAMPLES))
    task, options = make_task(), {"layers": LAYERS, "weight": 2.0, "teacher_cache": "memory"}
    if way == "wrapper":
        noted = Values()
        wrapped: Any = OTRTModule(task, make_teacher(), **options)
        make_trainer(max_epochs=2, callbacks=[noted]).fit(wrapped, loader(SAMPLES))
        assert_same_values(noted.values, expected)
        assert wrapped.otrt.cache.hits == SAMPLES
        return
    transfer, found = RepresentationTransfer(make_teacher(), **options), []
    optimizer = task.configure_optimizers()
    with transfer.attached(task):
        for _ in range(2):
            for batch in loader(SAMPLES):
                loss = task.loss(batch)
                term = transfer.loss()
                found.append(float(term.detach()) / 2)
                optimizer.zero_grad()
                (loss + term).backward()
                optimizer.step()
    assert_same_values(found, expected)
    assert transfer.cache.hits == SAMPLES


class Views(Task):
    """Two forwards in a step, of the batch and its mirror image."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss(batch) + F.cross_entropy(self.net(batch[0].flip(3)), batch[1])


class Quasi(Task):
    """Its closures run the same batch several times."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=3)


STEPS: dict[str, dict[str, Any]] = {
    "several views": {"task": lambda: make_task(Views)},
    "closures": {"task": lambda: make_task(Quasi)},
    "accumulation": {"trainer": {"accumulate_grad_batches": 4}},
    "mixed precision": {"trainer": {"precision": "bf16-mixed"}},
    "true precision": {"trainer": {"precision": "bf16-true"}},
    "true double": {"trainer": {"precision": "64-true"}},
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_other_kinds(name: str) -> None:
    setting = STEPS[name]
    task = setting.get("task", make_task)
    expected, _ = fit(task=task(), trainer=setting.get("trainer"))
    found, callback = fit("memory", task=task(), trainer=setting.get("trainer"))
    # A run without the cache sums in another order, which a shorter type shows more.
    assert_same_values(found, expected, tolerance=2e-2 if "bf16" in str(setting) else 1e-5)
    counted = callback.transfer.cache
    assert counted.misses == (2 * SAMPLES if name == "several views" else SAMPLES)
    assert counted.hits > 0


def test_partly_known_batches(tmp_path: Path) -> None:
    """A run on a part of the data, and then one on all of it."""
    teacher = make_teacher()
    expected, _ = fit(trainer={"max_epochs": 1})
    with forwards(teacher):
        fit(str(tmp_path), data=loader(20, 10), teacher=teacher)
    with forwards(teacher) as count:
        found, callback = fit(str(tmp_path), teacher=teacher, trainer={"max_epochs": 1})
    assert_same_values(found, expected)
    counted = callback.transfer.cache
    assert counted.hits + counted.misses == SAMPLES
    assert (counted.misses, counted.store.samples) == (12, SAMPLES)
    assert len(count) > 1


def test_a_later_run_does_not_run_the_teacher(tmp_path: Path) -> None:
    teacher = make_teacher()
    with forwards(teacher) as count:
        expected, _ = fit(str(tmp_path), teacher=teacher)
        before = len(count)
        found, callback = fit(str(tmp_path), teacher=teacher)
    assert len(count) - before == 3, "the trace"
    assert_same_values(found, expected)
    assert callback.transfer.cache.hit_rate == 1.0
    assert "GB" not in str(os.listdir(tmp_path))


@pytest.mark.parametrize("change", ["weights", "layers", "grid", "dtype", "scale"])
def test_another_teacher_shares_nothing(tmp_path: Path, change: str) -> None:
    fit(str(tmp_path))
    teacher, options = make_teacher(), {}
    if change == "weights":
        teacher.head.bias.data[-1] += 1e-6
    elif change == "layers":
        options = {"layers": {"net.block1": "block1"}}
    elif change == "grid":
        options = {"grid": 2}
    elif change == "dtype":
        options = {"teacher_dtype": "float64"}
    else:
        teacher.block1.temperature = 0.5
    _, callback = fit(str(tmp_path), teacher=teacher, **options)
    assert callback.transfer.cache.hits == SAMPLES
    assert len(os.listdir(tmp_path)) == 2


def test_the_same_teacher_again() -> None:
    """A second fit with the callback goes on with what is kept."""
    callback = OTRTCallback(make_teacher(), LAYERS, teacher_cache="memory")
    with forwards(callback.transfer.teacher.module) as count:
        for _ in range(2):
            make_trainer(max_epochs=1, callbacks=[callback]).fit(make_task(), loader(SAMPLES))
    assert callback.transfer.cache.hits == SAMPLES
    assert len(count) == FIRST + BATCHES - 1 + 3


class Averaged(pl.Callback):
    """Trains the teacher, as methods with a moving average do."""

    def __init__(self, teacher: nn.Module, *, by_data: bool) -> None:
        self.teacher, self.by_data = teacher, by_data

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        with torch.no_grad():
            for parameter in self.teacher.parameters():
                (parameter.data if self.by_data else parameter).mul_(0.99)


@pytest.mark.parametrize("by_data", [False, True])
@pytest.mark.parametrize("options", [{}, {"teacher_dtype": "bfloat16"}])
def test_a_teacher_that_is_trained_is_refused(by_data: bool, options: dict[str, Any]) -> None:
    teacher = make_teacher()
    callbacks = [OTRTCallback(teacher, LAYERS, teacher_cache="memory", **options), Averaged(teacher, by_data=by_data)]
    with pytest.raises(ValueError, match=r"its weights changed during the run \('block1.0.weight' among them\)"):
        make_trainer(callbacks=callbacks).fit(make_task(), loader())


def test_a_teacher_that_is_trained_runs_on_all_samples_where_not_strict() -> None:
    terms = []
    for cache in (None, "memory"):
        teacher, noted = make_teacher(), Values()
        callback = OTRTCallback(teacher, LAYERS, teacher_cache=cache, strict=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(max_epochs=2, callbacks=[callback, noted, Averaged(teacher, by_data=True)]).fit(
                make_task(), loader(SAMPLES)
            )
        told = [str(w.message) for w in caught if "teacher_cache" in str(w.message)]
        assert len(told) == (cache is not None)
        terms.append(noted.values)
    assert_same_values(terms[1], terms[0])


def test_weights_that_change_between_two_fits() -> None:
    teacher = make_teacher()
    callback = OTRTCallback(teacher, LAYERS, teacher_cache="memory")
    for _ in range(2):
        make_trainer(max_epochs=1, callbacks=[callback]).fit(make_task(), loader())
        teacher.block1[0].weight.data.mul_(0.5)
    assert callback.transfer.cache.hits == 0


class BatchNormAlways(Net):
    """Normalises by the batch, whatever its mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.batch_norm(x, None, None, training=True))


class DropoutAlways(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.1))


class AcrossSamples(Net):
    """Attention between the samples of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1)[None]
        return super().forward(F.scaled_dot_product_attention(rows, rows, rows)[0].view_as(x))


REFUSED = {
    BatchNormAlways: "mixes the samples of a batch",
    DropoutAlways: "random in evaluation mode",
    AcrossSamples: "mixes the samples of a batch",
}


@pytest.mark.filterwarnings("ignore:The forward of the teacher .DropoutAlways. draws random numbers")
@pytest.mark.parametrize("kind", REFUSED)
def test_teachers_that_cannot_be_kept(kind: type[Net]) -> None:
    with pytest.raises(ValueError, match=REFUSED[kind]) as error:
        fit("memory", teacher=kind(6))
    assert "Leave out `teacher_cache`" in str(error.value)
    assert kind.__name__ in str(error.value)


@pytest.mark.filterwarnings("ignore:The forward of the teacher .DropoutAlways. draws random numbers")
@pytest.mark.parametrize("kind", REFUSED)
def test_they_run_on_all_samples_where_not_strict(kind: type[Net]) -> None:
    torch.manual_seed(1)
    teacher = kind(6)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    expected, _ = fit(teacher=teacher, strict=False)
    teacher.load_state_dict(state)
    with pytest.warns(UserWarning, match=f"`teacher_cache` cannot be used.*{REFUSED[kind]}.*strict=False"):
        found, callback = fit("memory", teacher=teacher, strict=False)
    assert callback.transfer.cache.hits == 0
    if kind is not DropoutAlways:
        assert_same_values(found, expected)


def test_the_check_draws_no_random_number_and_writes_no_buffer() -> None:
    teacher, x = make_teacher(), make_data()[:8][0]
    buffers = {name: value.clone() for name, value in teacher.named_buffers()}
    transfer, student = RepresentationTransfer(teacher, {"block1": "block1"}, teacher_cache="memory"), Net()
    torch.manual_seed(5)
    with transfer.attached(student):
        student(x)
        transfer.loss()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(value, buffers[name]) for name, value in teacher.named_buffers())


class Augmented(Dataset[Any]):
    """Images with noise, other in each epoch."""

    def __init__(self) -> None:
        self.data = make_data(SAMPLES)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return x + 0.1 * torch.randn_like(x), y


def test_random_augmentation() -> None:
    with pytest.warns(UserWarning, match=r"In 2 epochs no sample came a second time.*FixedViews") as caught:
        _, callback = fit("memory", data=DataLoader(Augmented(), 8), trainer={"max_epochs": 4})
    assert len([w for w in caught if "FixedViews" in str(w.message)]) == 1
    assert callback.transfer.cache.store.samples == 2 * SAMPLES
    fixed = DataLoader(FixedViews(Augmented(), views=2), 8, shuffle=True)
    _, callback = fit("memory", data=fixed, trainer={"max_epochs": 6})
    assert callback.transfer.cache.store.samples <= 2 * SAMPLES
    assert callback.transfer.cache.hits > 3 * SAMPLES


def test_a_weight_of_zero_runs_no_teacher() -> None:
    teacher = make_teacher()
    with forwards(teacher) as count, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callback = OTRTCallback(teacher, LAYERS, teacher_cache="memory", schedule=lambda step: float(step >= 4))
        make_trainer(max_steps=8, callbacks=[callback]).fit(make_task(), loader())
    assert callback.transfer.cache.misses == 32
    assert len(count) == FIRST + 3


def test_what_was_kept_is_written_when_a_fit_fails(tmp_path: Path) -> None:
    class Failing(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise KeyError("on purpose")
            return super().training_step(batch, batch_idx)

    with pytest.raises(KeyError, match="on purpose"):
        fit(str(tmp_path), task=make_task(Failing), data=loader())
    _, callback = fit(str(tmp_path), data=loader(), trainer={"max_epochs": 1})
    assert (callback.transfer.cache.hits, callback.transfer.cache.misses) == (24, 40)


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(str(tmp_path), data=loader(16))

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.warns(UserWarning, match="only read") as caught:
        _, callback = fit(str(tmp_path), data=loader(32))
    assert len([w for w in caught if "only read" in str(w.message)]) == 1
    assert (callback.transfer.cache.hits, callback.transfer.cache.misses) == (32, 32)


def test_a_folder_that_goes_away(tmp_path: Path) -> None:
    class Clearing(pl.Callback):
        def on_train_epoch_end(self, *args: Any) -> None:
            shutil.rmtree(tmp_path / "kept", ignore_errors=True)

    expected, _ = fit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callback = OTRTCallback(make_teacher(), LAYERS, weight=2.0, teacher_cache=str(tmp_path / "kept"))
        noted = Values()
        torch.manual_seed(0)
        make_trainer(max_epochs=2, callbacks=[Clearing(), callback, noted]).fit(
            make_task(), loader(SAMPLES, shuffle=True)
        )
    assert_same_values(noted.values, expected)


class Counting(Net):
    """Counts its calls in a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_a_teacher_that_writes_to_its_own_buffers_is_refused() -> None:
    with pytest.raises(ValueError, match="its weights changed during the run \\('calls' among them\\)"):
        fit("memory", teacher=Counting(6))


class OfList(nn.Module):
    """Takes images one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: list[Tensor]) -> Tensor:
        return self.layer(torch.stack(x)).mean((2, 3))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_images_in_a_list(size: int) -> None:
    """Also as many as an image has channels."""
    transfer, student = RepresentationTransfer(OfList(), {"layer": "layer"}, teacher_cache="memory"), OfList()
    words = r"\(OfList\): its samples enter as items of a list.*stack them in `teacher_inputs`"
    with transfer.attached(student):
        with pytest.raises(ValueError, match=words):
            student(list(torch.randn(size, 3, 8, 8)))
        transfer.discard()


class Padding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.nested.to_padded_tensor(x, 0.0).sum(1) if x.is_nested else x.to_dense())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "x",
    [
        lambda: torch.nested.nested_tensor([torch.randn(size, 3) for size in (2, 4, 3, 4)]),
        lambda: torch.randn(4, 3).to_sparse(),
    ],
)
def test_inputs_that_are_no_dense_tensors(x: Any) -> None:
    transfer = RepresentationTransfer(Padding(), {"layer": "layer"}, teacher_cache="memory")
    student = Padding()
    with transfer.attached(student):
        with pytest.raises(ValueError, match="reads dense tensors. Convert it in `teacher_inputs`. Leave out"):
            student(x())
        transfer.discard()


def test_copies_and_pickles_of_the_callback() -> None:
    callback = OTRTCallback(make_teacher(), LAYERS, teacher_cache="memory")
    make_trainer(callbacks=[callback]).fit(make_task(), loader())
    copied, pickled = copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))
    hits = [callback.transfer.cache.hits, pickled.transfer.cache.hits]
    for each in (copied, pickled):
        make_trainer(callbacks=[each]).fit(make_task(), loader())
    assert callback.transfer.cache.hits - hits[0] == 32, "a copy goes on with the same samples"
    assert pickled.transfer.cache.hits - hits[1] == 0, "a pickle has none"


class Conditioned(Net):
    """A teacher whose output depends on plain attributes, and which counts its forwards."""

    def __init__(self, gain: int = 1) -> None:
        super().__init__(8)
        self.gain, self.act, self.calls, self.seen = gain, torch.relu, 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        return super().forward(self.act(self.gain * x))


def conditioned(**attributes: Any) -> Conditioned:
    torch.manual_seed(1)
    teacher = Conditioned()
    for name, value in attributes.items():
        setattr(teacher, name, value)
    return teacher


def doubled(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (2 * args[0],)


OTHERS: dict[str, Any] = {
    "a number": lambda teacher: setattr(teacher, "gain", 3),
    "a function": lambda teacher: setattr(teacher, "act", torch.tanh),
    "a hook": lambda teacher: teacher.register_forward_pre_hook(doubled),
}


class TestAnotherTeacherWithTheSameWeights:
    """It has another store: what is kept of the first one would be another term, and nothing would show it."""

    @pytest.mark.parametrize("name", OTHERS)
    def test_in_a_later_run(self, name, tmp_path):
        fit(str(tmp_path), teacher=conditioned())
        teacher = conditioned()
        OTHERS[name](teacher)
        expected, _ = fit(teacher=copy.deepcopy(teacher))
        found, callback = fit(str(tmp_path), teacher=teacher)
        assert_same_values(found, expected)
        assert callback.transfer.cache.misses == SAMPLES

    @pytest.mark.parametrize("name", OTHERS)
    def test_in_a_later_fit(self, name):
        teacher = conditioned()
        _, callback = fit("memory", teacher=teacher)
        OTHERS[name](teacher)
        expected, _ = fit(teacher=copy.deepcopy(teacher))
        noted = Values()
        torch.manual_seed(0)
        make_trainer(max_epochs=2, callbacks=[callback, noted]).fit(make_task(), loader(SAMPLES, shuffle=True))
        assert_same_values(noted.values, expected)

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
    def test_of_a_copied_callback(self, how, tmp_path):
        _, callback = fit(str(tmp_path), teacher=conditioned())
        copied = how(callback)
        copied.transfer.teacher.module.gain = 3
        expected, _ = fit(teacher=conditioned(gain=3))
        noted = Values()
        torch.manual_seed(0)
        make_trainer(max_epochs=2, callbacks=[copied, noted]).fit(make_task(), loader(SAMPLES, shuffle=True))
        assert_same_values(noted.values, expected)

    @pytest.mark.parametrize("name", OTHERS)
    @pytest.mark.parametrize("cache", ["memory", "folder"])
    def test_between_two_epochs(self, name, cache, tmp_path):
        """The store is changed, and nothing is refused."""

        class Change(pl.Callback):
            def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                if trainer.current_epoch == 1:
                    (callback,) = (each for each in trainer.callbacks if isinstance(each, OTRTCallback))
                    OTHERS[name](callback.transfer.teacher.module)

        noted: list[list[float]] = []
        for kept in (None, str(tmp_path) if cache == "folder" else cache):
            values = Values()
            torch.manual_seed(0)
            callback = OTRTCallback(conditioned(), LAYERS, weight=2.0, teacher_cache=kept)
            make_trainer(max_epochs=3, callbacks=[callback, values, Change()]).fit(
                make_task(), loader(SAMPLES, shuffle=True)
            )
            noted.append(values.values)
        assert_same_values(noted[1], noted[0])
        assert (callback.transfer.cache.misses, callback.transfer.cache.hits) == (2 * SAMPLES, SAMPLES)

    def test_a_counter_makes_no_other_teacher(self, tmp_path):
        """Whatever it has counted before: a new one, one that has run, and one in a second fit."""
        teacher = conditioned()
        for hits in (SAMPLES, 2 * SAMPLES, 2 * SAMPLES):
            _, callback = fit(str(tmp_path), teacher=teacher)
            assert callback.transfer.cache.hits == hits
        _, callback = fit(str(tmp_path), teacher=conditioned())
        assert callback.transfer.cache.hits == 2 * SAMPLES

    def test_an_attribute_that_is_set_in_each_step(self):
        """As of a network that is told its domain: no known sample then, but the right term."""

        class Domain(pl.Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
                (callback,) = (each for each in trainer.callbacks if isinstance(each, OTRTCallback))
                callback.transfer.teacher.module.gain = 1 + trainer.global_step % 3

        noted: list[list[float]] = []
        for kept in (None, "memory"):
            values = Values()
            torch.manual_seed(0)
            callback = OTRTCallback(conditioned(), LAYERS, weight=2.0, teacher_cache=kept)
            trainer = make_trainer(max_epochs=2, callbacks=[callback, Domain(), values])
            told = pytest.warns(TransferWarning, match="has changed 3 times in this run: 'gain'")
            with nullcontext() if kept is None else told:
                trainer.fit(make_task(), loader(SAMPLES, shuffle=True))
            noted.append(values.values)
        assert_same_values(noted[1], noted[0])
