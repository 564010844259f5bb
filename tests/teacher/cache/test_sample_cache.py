"""The teacher runs on new samples alone, and a batch is what it would have been without a cache."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_otrt import TeacherCache
from lightning_otrt.teacher.cache.sample_cache import CannotCacheError, SampleCache, _write_here

torch.manual_seed(0)
X = torch.randn(40, 3)
MIX = torch.randn(3, 3)
#: Of one sample: 13 numbers, filled up to 16, and its keys.
BYTES = 16 * 4 + 40


class Teacher:
    """Counts the samples of its runs."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.checks = 0
        self.change = False

    def __call__(self, inputs: Any, size: int) -> dict[str, Tensor]:
        (x, *_), _ = inputs
        self.runs.append(len(x))
        return {"map": (x[:, :, None] * x[:, None]).contiguous(), "vector": x @ MIX, "double": x.double().sum(1) ** 2}

    @contextmanager
    def undone(self) -> Iterator[None]:
        self.checks += 1
        yield


def opened(option: Any = "memory", batch: int = 8, inputs: Any = None) -> SampleCache:
    cache = SampleCache.of(option)
    assert cache is not None
    cache.open("a teacher", batch, inputs or ((X[:batch],), {}), torch.float32)
    return cache


def take(cache: SampleCache, teacher: Teacher, x: Tensor, *others: Any) -> None:
    """A batch, compared with what the teacher gives without a cache."""
    found = cache.tensors(((x, *others), {}), teacher, lambda: None, teacher.undone)
    expected = Teacher()(((x,), {}), len(x))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.fixture(params=["memory", "folder"])
def option(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return "memory" if request.param == "memory" else tmp_path / "kept"


def test_runs_on_new_samples_alone(option: Any) -> None:
    cache, teacher = opened(option), Teacher()
    take(cache, teacher, X[:8])
    assert (teacher.runs, teacher.checks) == ([8, 8, 3, 5], 1), "the whole twice, and its parts once"
    take(cache, teacher, X[:8].flip(0))
    take(cache, teacher, X[4:12])
    take(cache, teacher, X[20:24])
    take(cache, teacher, X[torch.tensor([0, 30, 1, 31, 32, 2])])
    assert teacher.runs[4:] == [4, 4, 3]
    assert (cache.hits, cache.misses) == (8 + 4 + 3, 8 + 4 + 4 + 3)
    assert cache.hit_rate == 15 / 34


def test_a_sample_twice_in_a_batch() -> None:
    cache, teacher = opened(), Teacher()
    take(cache, teacher, X[torch.tensor([0, 1, 0, 0])])
    take(cache, teacher, X[torch.tensor([1, 2, 2, 0])])
    cache.flush()
    assert cache.store.samples == 3


def test_another_cache_on_the_folder(tmp_path: Path) -> None:
    first, teacher = opened(tmp_path), Teacher()
    take(first, teacher, X)
    first.flush()
    later, idle = opened(tmp_path), Teacher()
    take(later, idle, X.flip(0))
    assert (idle.runs, idle.checks) == ([], 0), "what is there was checked when it was made"
    take(later, idle, torch.cat([X[:3], X[:1] + 1]))
    assert (idle.runs, idle.checks) == ([4, 4, 1, 3], 1), "the first batch with a new sample is checked"


def test_one_sample_shows_less() -> None:
    """Whether samples are mixed can be seen in a batch of two alone."""
    cache, teacher = opened(batch=1), Teacher()
    take(cache, teacher, X[:1])
    take(cache, teacher, X[1:2])
    assert (teacher.runs, teacher.checks) == ([1, 1, 1], 1)
    take(cache, teacher, X[1:4])
    assert (teacher.runs[3:], teacher.checks) == ([3, 3, 1, 2], 2)
    take(cache, teacher, X[1:9])
    assert teacher.runs[7:] == [5]


def test_what_is_common_to_all_samples() -> None:
    camera = torch.eye(3)
    inputs = ((X[:8], camera, "text", 2.0), {})
    cache, teacher = opened(inputs=inputs), Teacher()
    for _ in range(2):
        take(cache, teacher, X[:8], camera, "text", 2.0)
    assert cache.hits == 8
    for others in [(camera + 1, "text", 2.0), (camera, "other", 2.0), (camera, "text", 3.0)]:
        take(cache, teacher, X[:8], *others)
    assert cache.hits == 8, "each of them changes what a sample is"
    runs = len(teacher.runs)
    take(cache, teacher, X[:3], camera, "text", 2.0)
    take(cache, teacher, X[:3], camera, "text", 2.0)
    assert (teacher.runs[runs:], cache.hits) == ([3, 3], 8), "as many samples as the matrix has rows: not by sample"


@pytest.mark.parametrize(
    "entries",
    [
        [f"{i}.png" for i in range(40)],
        tuple(range(40)),
        [{"id": i, "size": (64, i % 3)} for i in range(40)],
        [None] * 39 + ["x"],
        [[f"word {i}", b"bytes"] for i in range(40)],
    ],
)
def test_lists_with_an_entry_for_each_sample(option: Any, entries: Any) -> None:
    """Names of files, numbers and other facts of the samples, as a DataLoader collates them."""
    cache, teacher = opened(option, inputs=((X[:8], entries[:8]), {})), Teacher()
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for order in (torch.arange(40), shuffled, shuffled.flip(0)):
        for part in order.split(8):
            take(cache, teacher, X[part], type(entries)(entries[i] for i in part.tolist()))
    assert (cache.hits, cache.misses) == (80, 40)
    take(cache, teacher, X[3:6], type(entries)(["new", *entries[4:6]]))
    assert cache.misses == 41, "an entry is part of its sample"
    take(cache, teacher, X[:1], entries[:1])
    assert cache.misses == 41, "also in a batch of one"


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_list_that_is_as_long_as_the_batch_by_chance(option: Any, size: int) -> None:
    """As the names of the classes, which a teacher takes as a whole."""

    def run(inputs: Any, _: int) -> dict[str, Tensor]:
        (x, names), _ = inputs
        return {"scores": x[:, :1] * torch.tensor([float(len(name)) for name in names]).mean()}

    names = ["cat", "ostrich", "dog", "bird", "cattle", "a", "bee", "goose"][:size]
    calls = Teacher()
    for _ in range(2):
        cache = opened(option, batch=size, inputs=((X[:size], names), {}))
        for others in (names, [*names[:-1], "other"], names):
            for x in (X[:size], X[:1], X[size:3], X[4:12], X[:size].flip(0)):
                if len(x):
                    found = cache.tensors(((x, others), {}), run, lambda: None, calls.undone)
                    assert torch.equal(found["scores"], run(((x, others), {}), 0)["scores"])
    assert cache.hits


def test_lists_of_one_are_not_the_entries_of_a_later_batch(tmp_path: Path) -> None:
    """What was kept for one sample and its list of one is not that of a batch whose list has both."""

    def run(inputs: Any, _: int) -> dict[str, Tensor]:
        (x, names), _ = inputs
        return {"scores": x * sum(map(len, names))}

    for batches in ([(X[:1], ["cat"]), (X[1:2], ["ostrich"])], [(X[:2], ["cat", "ostrich"])]):
        first, names = batches[0]
        cache, calls = opened(tmp_path, batch=len(first), inputs=((first, names), {})), Teacher()
        for x, names in batches:
            found = cache.tensors(((x, names), {}), run, lambda: None, calls.undone)
            assert torch.equal(found["scores"], x * sum(map(len, names)))
        cache.flush()


def test_a_list_that_the_teacher_needs_whole() -> None:
    """It fails where it gets a part: so the list is common to the samples, and the samples are kept."""

    def run(inputs: Any, _: int) -> dict[str, Tensor]:
        (x, sizes), _ = inputs
        height, width = sizes
        return {"scores": x * height * width}

    cache, calls = opened(batch=2, inputs=((X[:2], [4, 5]), {})), Teacher()
    for _ in range(2):
        for sizes in ([4, 5], [4, 6], (4, 5)):
            found = cache.tensors(((X[:2], sizes), {}), run, lambda: None, calls.undone)
            assert torch.equal(found["scores"], X[:2] * sizes[0] * sizes[1])
    assert (cache.hits, cache.misses) == (6, 6)


def test_entries_of_samples_that_nothing_can_be_read_of() -> None:
    cache = opened()
    with pytest.raises(CannotCacheError, match="is of type object, whose content cannot be read"):
        cache.tensors(((X[:2], [object(), object()]), {}), Teacher(), lambda: None, Teacher().undone)


def test_tensors_that_come_from_the_second_batch_on() -> None:
    """As a mask that a batch without padding leaves out."""
    mask, cache, teacher = torch.rand(40, 4), opened(), Teacher()
    for _ in range(2):
        take(cache, teacher, X[:8])
        take(cache, teacher, X[8:16], mask[8:16])
        take(cache, teacher, X[12:24], mask[12:24])
    assert (cache.hits, cache.misses) == (4 + 28, 24)
    assert teacher.runs == [8, 8, 3, 5] * 2 + [8], "each form is checked once"
    take(cache, teacher, X[8:16], mask[:8])
    assert cache.hits == 32, "the mask is part of the sample"


def test_a_first_batch_of_one_sample() -> None:
    """Positions (1, T) have as many rows as that batch has samples."""
    positions = torch.arange(5.0)[None]
    inputs = ((X[:1], positions), {})
    cache, teacher = opened(batch=1, inputs=inputs), Teacher()
    take(cache, teacher, X[:1], positions)
    for _ in range(3):
        take(cache, teacher, X[1:9], positions)
        take(cache, teacher, X[5:13], positions)
    assert (cache.hits, cache.misses) == (4 + 32, 1 + 8 + 4)
    take(cache, teacher, X[5:6], positions)
    assert cache.misses == 14, "one sample again: not by sample"
    cache.open("a teacher", 8, ((X[:8], positions), {}), torch.float32)
    runs = len(teacher.runs)
    take(cache, teacher, X[20:28], positions)
    assert teacher.runs[runs:] == [8], "the next run knows it"


def test_a_later_form_that_cannot_be_kept() -> None:
    def run(inputs: Any, size: int) -> dict[str, Tensor]:
        (x, *mask), _ = inputs
        return {"a": x - x.mean() if mask else x}

    cache, calls = opened(), Teacher()

    def call(*args: Tensor) -> Tensor:
        return cache.tensors((args, {}), run, lambda: None, calls.undone)["a"]

    call(X[:8])
    with pytest.warns(UserWarning, match=r"keeps no samples of batches that are built as this one.*it mixes the sampl"):
        assert torch.equal(call(X[:8], X[:8]), X[:8] - X[:8].mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(call(X[:6], X[:6]), X[:6] - X[:6].mean())
        call(X[:8])
    assert (cache.hits, cache.misses, cache.store.samples) == (8, 8 + 8 + 6, 8)


def test_inputs_that_cannot_be_kept() -> None:
    with pytest.raises(CannotCacheError, match="none of its inputs has one entry for each of the 8 samples"):
        opened(inputs=((torch.zeros(5, 8),), {}))
    with pytest.raises(CannotCacheError, match="is of type object, whose content cannot be read"):
        opened(inputs=((X[:8], object()), {}))
    cache, teacher = opened(), Teacher()
    with pytest.raises(CannotCacheError, match="is of type object"):
        cache.tensors(((X[:8], object()), {}), teacher, lambda: None, teacher.undone)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (lambda x: x - x.mean(), "mixes the samples"),
        (lambda x: torch.nn.functional.dropout(x), "random in evaluation mode"),
    ],
)
def test_refused(net: Any, words: str) -> None:
    cache = opened()
    with pytest.raises(CannotCacheError, match=words):
        cache.tensors(((X[:8],), {}), lambda inputs, size: {"a": net(inputs[0][0])}, lambda: None, Teacher().undone)
    cache.flush()
    assert cache.store.samples == 0


def test_verify_comes_before_what_is_found_is_used() -> None:
    cache, teacher = opened(), Teacher()
    take(cache, teacher, X[:8])

    def refuse() -> None:
        raise CannotCacheError("changed")

    with pytest.raises(CannotCacheError, match="changed"):
        cache.tensors(((X[:8],), {}), teacher, refuse, teacher.undone)
    assert cache.hits == 0


def test_settings_of_the_process_make_other_samples() -> None:
    cache, teacher = opened(), Teacher()
    take(cache, teacher, X[:8])
    with torch.autocast("cpu", torch.bfloat16, enabled=True):
        cache.tensors(((X[:8],), {}), teacher, lambda: None, teacher.undone)
    assert cache.hits == 0
    take(cache, teacher, X[:8])
    assert cache.hits == 8


def test_another_teacher_empties_the_memory(tmp_path: Path) -> None:
    for option in ("memory", tmp_path):
        cache, teacher = opened(option), Teacher()
        take(cache, teacher, X[:8])
        cache.open("a teacher", 8, ((X[:8],), {}), torch.float32)
        take(cache, teacher, X[:8])
        assert cache.hits == 8, "the same one goes on"
        cache.open("another teacher", 8, ((X[:8],), {}), torch.float32)
        take(cache, teacher, X[:8])
        assert (cache.hits, teacher.checks) == (8, 2)


def test_full_is_full() -> None:
    # A row of 9 + 3 + 1 numbers is filled up to 16.
    cache, teacher = opened(f"{10 * (4 * 16 + 40)}B"), Teacher()
    take(cache, teacher, X[:8])
    with pytest.warns(UserWarning, match="The teacher cache in memory takes no more samples: it holds 10 samples"):
        [take(cache, teacher, x) for x in (X[8:16], X[:16])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            take(cache, teacher, X[:16])
    assert teacher.runs[-3:] == [6, 6, 6]


def test_short_types_are_rounded_once() -> None:
    cache, teacher = opened(TeacherCache(dtype="bfloat16")), Teacher()
    take(cache, teacher, X[:8])
    found = cache.tensors(((X[:8],), {}), teacher, lambda: None, teacher.undone)
    expected = Teacher()(((X[:8],), {}), 8)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.bfloat16().to(tensor.dtype))


class TestEpochs:
    def run(self, cache: SampleCache, batches: list[Tensor]) -> None:
        teacher = Teacher()
        cache.start_epoch()
        for x in batches:
            take(cache, teacher, x)
        cache.end_epoch()

    def test_new_samples_for_ever(self) -> None:
        cache = opened()
        self.run(cache, [X[:8], X[8:16]])
        with pytest.warns(
            UserWarning, match=r"In 2 epochs no sample came a second time.*`FixedViews\(dataset, views=8"
        ):
            self.run(cache, [X[16:24]])
        kept = cache.store.samples
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.run(cache, [X[24:32]])
            self.run(cache, [X[24:32]])
        assert (kept, cache.store.samples, cache.hits) == (24, 24, 0)
        self.run(cache, [X[:8]])
        assert cache.hits == 8, "what is there is still found"
        self.run(cache, [X[24:32]])
        self.run(cache, [X[24:32]])
        assert (cache.store.samples, cache.hits) == (32, 16), "one came again, so others may, too"

    def test_new_samples_that_fill_the_cache(self) -> None:
        """Then two things are said: that it is full, and that no sample comes again."""
        cache = opened(TeacherCache(limit=20 * BYTES))
        with pytest.warns(UserWarning, match="takes no more samples"):
            self.run(cache, [X[:8], X[8:16], X[16:24]])
        with pytest.warns(UserWarning, match=r"In 2 epochs no sample came a second time.*FixedViews"):
            self.run(cache, [X[24:32]])

    def test_a_folder_that_is_full_of_other_data(self, tmp_path: Path) -> None:
        """Its samples are not those of this run, which may well come again."""
        limit = 20 * BYTES
        with pytest.warns(UserWarning, match="takes no more samples"):
            self.run(opened(TeacherCache(tmp_path, limit=limit)), [X[:8], X[8:16], X[16:24]])
        again = opened(TeacherCache(tmp_path, limit=limit))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*second time")
            warnings.filterwarnings("ignore", message=".*takes no more")
            for _ in range(3):
                self.run(again, [X[24:32]])

    def test_each_run_is_counted_by_itself(self) -> None:
        """Folds with one callback and an epoch each: no sample comes again in the first ones."""
        cache = opened()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for x in (X[:8], X[8:16], X[16:24], X[24:32]):
                cache.open("a teacher", 8, ((x,), {}), torch.float32)
                self.run(cache, [x])
        assert cache.store.samples == 32

    def test_a_new_run_keeps_again(self) -> None:
        cache = opened()
        self.run(cache, [X[:8]])
        with pytest.warns(UserWarning, match="It keeps no more of them, unless one does"):
            self.run(cache, [X[8:16]])
        cache.open("a teacher", 8, ((X[:8],), {}), torch.float32)
        self.run(cache, [X[16:24]])
        assert cache.store.samples == 24

    @pytest.mark.parametrize("second", [[X[:1].repeat(3, 1)], [X[7:16]]])
    def test_a_single_hit_is_enough(self, second: list[Tensor]) -> None:
        cache = opened()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for batches in ([X[:8]], second, [X[16:24]], [X[24:32]]):
                self.run(cache, batches)

    def test_samples_that_cannot_be_kept_are_misses(self) -> None:
        camera = torch.eye(3)
        cache, teacher = opened(inputs=((X[:8], camera), {})), Teacher()
        cache.start_epoch()
        take(cache, teacher, X[:8], camera)
        cache.end_epoch()
        cache.start_epoch()
        take(cache, teacher, X[:3], camera)
        with pytest.warns(UserWarning, match="In 2 epochs no sample came a second time"):
            cache.end_epoch()
        assert (cache.hits, cache.misses) == (0, 11)

    def test_epochs_without_a_forward_do_not_count(self) -> None:
        cache = opened()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for batches in ([], [], [X[:8]], []):
                self.run(cache, batches)

    def test_what_others_write_is_found_in_the_next_epoch(self, tmp_path: Path) -> None:
        mine, other, teacher = opened(tmp_path), opened(tmp_path), Teacher()
        self.run(other, [X[:8]])
        mine.start_epoch()
        take(mine, teacher, X[:8])
        assert not teacher.runs


def test_what_was_kept_is_written_when_a_cache_ends(tmp_path: Path) -> None:
    cache, gone = opened(tmp_path), []
    weakref.finalize(cache, gone.append, True)
    take(cache, Teacher(), X[:8])
    take(cache, Teacher(), X[8:16])
    del cache
    gc.collect()
    assert gone, "what writes it does not keep it alive"
    assert opened(tmp_path).store.samples == 16


def test_a_forked_process_writes_nothing(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    take(cache, Teacher(), X[:8])
    _write_here(os.getpid() + 1, cache.store, cache._adding)
    assert opened(tmp_path).store.samples == 0


LOOP = """
import sys, torch
from lightning_otrt import RepresentationTransfer
from torch import nn

torch.manual_seed(0)
transfer = RepresentationTransfer(nn.Sequential(nn.Linear(3, 4)), {"0": "0"}, teacher_cache=sys.argv[1])
student = nn.Sequential(nn.Linear(3, 4))
transfer.attach(student)
recording = transfer.recording()
recording.__enter__()
for _ in range(3):
    student(torch.randn(8, 3))
    transfer.loss()
if sys.argv[2:]:
    raise KeyError("on purpose")
"""


@pytest.mark.parametrize("error", [[], pytest.param(["raise"], marks=pytest.mark.slow)])
def test_what_was_kept_is_written_when_a_process_ends(tmp_path: Path, error: list[str]) -> None:
    """As that of a plain loop that never detaches."""
    run = subprocess.run(
        [sys.executable, "-c", LOOP, str(tmp_path), *error], capture_output=True, text=True, check=False
    )
    assert run.returncode == len(error), run.stderr
    [path] = tmp_path.rglob("*.safetensors")
    with safe_open(path, "pt") as file:
        assert len(file.get_tensor("keys")) == 24


def test_pickles_hold_no_samples(tmp_path: Path) -> None:
    for option, known in (("memory", 0), (tmp_path, 8)):
        cache, teacher = opened(option), Teacher()
        take(cache, teacher, X[:8])
        cache.flush()
        take(cache, teacher, X[8:16])
        other = pickle.loads(pickle.dumps(cache))
        assert other.store.samples == known
        hits = other.hits
        take(other, teacher, X[:8])
        assert other.hits - hits == known
