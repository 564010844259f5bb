"""Stores give back what was put in, in memory and in a folder; full is full."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import FINGERPRINT, check, keys_of, tensors_of

from lightning_otrt.teacher.cache import store as store_module
from lightning_otrt.teacher.cache.folder_store import FolderStore
from lightning_otrt.teacher.cache.row_layout import RowLayout
from lightning_otrt.teacher.cache.store import SampleStore, checksums, parse_size

Make = Callable[..., SampleStore]


@pytest.fixture(params=["memory", "folder"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "memory":
        return SampleStore
    return lambda **options: FolderStore(tmp_path, FINGERPRINT, **options)


@pytest.fixture(params=[1, 1000, 2**25])
def segment_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16])
def test_gives_back_what_was_put_in(make: Make, segment_bytes: int, dtype: Any) -> None:
    store = make(dtype=dtype)
    samples = torch.arange(40)
    assert not check(store, samples).any()
    assert store.add(keys_of(samples[:25]), tensors_of(samples[:25])) == 25
    assert check(store, samples).tolist() == [True] * 25 + [False] * 15
    store.flush()
    assert check(store, samples.flip(0)).tolist() == [False] * 15 + [True] * 25
    assert store.add(keys_of(samples[20:]), tensors_of(samples[20:])) == 15
    assert check(store, samples[torch.randperm(40)]).all()
    assert store.samples == 40


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_calls(make: Make, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", 3000)
    torch.manual_seed(seed)
    store, known = make(), set()
    for _ in range(60):
        samples = torch.randint(200, (int(torch.randint(20, ())),))
        expected = [sample in known for sample in samples.tolist()]
        assert check(store, samples).tolist() == expected
        new = len(set(samples.tolist()) - known)
        assert store.add(keys_of(samples), tensors_of(samples)) == new
        known |= set(samples.tolist())
        if torch.rand(()) < 0.2:
            store.flush()
    assert store.samples == len(known)


def test_bfloat16_rounds() -> None:
    store, exact = SampleStore(dtype="bfloat16"), torch.rand(3, 5)
    keys = keys_of(torch.arange(3))
    store.add(keys, {"neurons": exact})
    found = store.lookup(keys).tensors["neurons"]
    assert found.dtype == torch.float32
    assert torch.equal(found, exact.bfloat16().float())
    assert store.bytes == 3 * (8 * 2 + 40)


def test_float32_is_exact(make: Make) -> None:
    store = make()
    keys = keys_of(torch.arange(4))
    strange = torch.tensor([[0.0, -0.0], [float("inf"), float("nan")], [1e-45, -3e38], [0.1, 1 / 3]])
    store.add(keys, {"neurons": strange})
    store.flush()
    found = store.lookup(keys).tensors["neurons"]
    assert torch.equal(found.view(torch.int32), strange.view(torch.int32))


def test_answers_are_the_callers_own(make: Make) -> None:
    store, samples = make(), torch.arange(3)
    given = tensors_of(samples)
    store.add(keys_of(samples), given)
    for tensor in given.values():
        tensor.zero_()
    store.lookup(keys_of(samples)).tensors["neurons"].zero_()
    assert check(store, samples).all()


def test_inputs_of_other_shapes_have_other_tensors(make: Make, segment_bytes: int) -> None:
    store = make()
    short, long = torch.arange(5), torch.arange(100, 107)
    store.add(keys_of(short), tensors_of(short, 20))
    store.add(keys_of(long), tensors_of(long, 50))
    store.add(keys_of(short + 50), tensors_of(short + 50, 20))
    assert check(store, torch.cat([short, short + 50]), 20).all()
    assert check(store, long, 50).all()
    # Those of the first are known, and the others are made anew: one batch has one layout.
    mask, tensors = store.lookup(keys_of(torch.cat([short, long])))
    assert mask.tolist() == [True] * 5 + [False] * 7
    assert tensors["neurons"].shape == (5, 2, 10)


def test_tensors_with_a_graph_are_kept_without(make: Make) -> None:
    store, keys = make(), keys_of(torch.arange(2))
    store.add(keys, {"neurons": torch.ones(2, 3, requires_grad=True) * 2})
    assert not store.lookup(keys).tensors["neurons"].requires_grad


@pytest.mark.parametrize("limit", [1, 24 + 4 * 64 - 1, 10 * (24 + 4 * 64), "3KB"])
def test_full_is_full(make: Make, limit: int | str) -> None:
    store, samples = make(limit=limit), torch.arange(20)
    # A key and its checksum in a file; a key beside the row, and a key with a place in the index, in memory.
    size = (24 if isinstance(store, FolderStore) else 40) + 4 * RowLayout.of(tensors_of(samples)).width
    fits = parse_size(limit) // size
    with pytest.warns(UserWarning, match=rf"takes no more samples: it holds {fits} samples of {size} bytes") as caught:
        assert store.add(keys_of(samples), tensors_of(samples)) == fits
    assert len(caught) == 1
    assert store.is_full
    assert check(store, samples).tolist() == [True] * fits + [False] * (20 - fits)
    assert store.bytes == fits * size <= parse_size(limit)
    # One message, and no more work.
    assert store.add(keys_of(samples), tensors_of(samples)) == 0
    assert check(store, samples).sum() == fits


def test_what_is_known_needs_no_space(make: Make) -> None:
    store, samples = make(limit=5 * (40 + 4 * 64)), torch.arange(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.add(keys_of(samples), tensors_of(samples)) == 5
        assert store.add(keys_of(samples), tensors_of(samples)) == 0
    assert not store.is_full


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [
        ("4GB", 4 * 10**9),
        ("512 MiB", 2**29),
        ("1.5gib", 3 * 2**29),
        ("10B", 10),
        (7, 7),
        ("2TB", 2 * 10**12),
        ("1TiB", 2**40),
        (".5GB", 5 * 10**8),
        ("4GBytes", 4 * 10**9),
    ],
)
def test_sizes(size: int | str, bytes_: int) -> None:
    assert parse_size(size) == bytes_


@pytest.mark.parametrize(
    "size",
    [
        "",
        "4",
        "4G",
        "GB",
        "-4GB",
        "0GB",
        "4 bananas",
        "4PB",
        "4.GB",
        "1.2.3GB",
        "4 gigabytes",
        0,
        -1,
        True,
        1.5,
        None,
        "1TiB2",
    ],
)
def test_what_is_no_size(size: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected a size such as '4GB'"):
        parse_size(size)


@pytest.mark.parametrize("dtype", ["float16", torch.float64, "int8", None])
def test_types(dtype: Any) -> None:
    with pytest.raises(ValueError, match="type of a teacher cache"):
        SampleStore(dtype=dtype)


@pytest.mark.parametrize(
    ("tensors", "error", "match"),
    [
        ({}, ValueError, "2 samples, one for each key, but got none"),
        ({"a": torch.zeros(2), "b": torch.zeros(3, 4)}, ValueError, r"\{'b': \(3, 4\)\}"),
        ({"a": torch.tensor(1.0)}, ValueError, r"\{'a': \(\)\}"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, TypeError, "'a' to hold floating-point numbers .* torch.int64"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, TypeError, "torch.complex64"),
    ],
)
def test_bad_tensors(make: Make, tensors: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make().add(keys_of(torch.arange(2)), tensors)


@pytest.mark.parametrize(
    "keys", [torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)]
)
def test_bad_keys(make: Make, keys: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"Expected keys \(B, 2\) in int64"):
        make().lookup(keys)
    with pytest.raises(ValueError, match=r"Expected keys \(B, 2\) in int64"):
        make().add(keys, {"a": torch.zeros(2)})


def test_empty_batches(make: Make) -> None:
    store, none = make(), torch.arange(0)
    assert store.add(keys_of(none), tensors_of(none)) == 0
    assert check(store, none).shape == (0,)


def test_copies_and_pickles(make: Make) -> None:
    store, samples = make(limit="1MB", dtype="bfloat16"), torch.arange(3)
    store.add(keys_of(samples), tensors_of(samples))
    store.flush()
    assert copy.deepcopy(store) is store
    other = pickle.loads(pickle.dumps(store))
    assert repr(other) == repr(store)
    assert (other.limit, other.dtype) == (10**6, torch.bfloat16)
    # A folder is there for the other process; memory is not.
    assert check(other, samples).all() == isinstance(store, FolderStore)


def test_checksums_see_every_bit() -> None:
    samples = torch.arange(2)
    keys = keys_of(samples).numpy()
    words = torch.randint(-(2**63), 2**63 - 1, (2, 30)).numpy()
    expected = checksums(keys, words)
    for place in range(30):
        for bit in range(63):
            words[0, place] ^= 1 << bit
            assert (checksums(keys, words) != expected).tolist() == [True, False]
            words[0, place] ^= 1 << bit
    assert (checksums(keys[::-1], words) != expected).all()
    assert (checksums(keys, words[:, ::-1]) != expected).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_to_and_from_a_gpu(make: Make) -> None:
    store, samples = make(), torch.arange(9)
    store.add(keys_of(samples), {name: tensor.cuda() for name, tensor in tensors_of(samples).items()})
    found = store.lookup(keys_of(samples), "cuda").tensors
    for name, expected in tensors_of(samples).items():
        assert found[name].is_cuda
        assert torch.equal(found[name].cpu(), expected)


def test_a_default_device_is_not_that_of_the_store(make: Make) -> None:
    """``torch.set_default_device("cuda")``; the store is on the host."""
    store, samples = make(), torch.arange(5)
    store.add(keys_of(samples), tensors_of(samples))
    with torch.device("meta"):
        mask, tensors = store.lookup(keys_of(samples))
    assert mask.all()
    assert torch.equal(tensors["neurons"], tensors_of(samples)["neurons"])
