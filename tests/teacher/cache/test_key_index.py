"""A table of keys against a dictionary of Python."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_otrt.teacher.cache.key_index import KeyIndex


def random_keys(count: int, generator: np.random.Generator) -> np.ndarray:
    return generator.integers(-(2**63), 2**63 - 1, (count, 2))


def pairs(keys: np.ndarray) -> list[tuple[int, int]]:
    return [tuple(key) for key in keys.tolist()]


@pytest.mark.parametrize("seed", range(5))
def test_is_a_dictionary(seed: int) -> None:
    generator = np.random.default_rng(seed)
    index, expected = KeyIndex(), {}
    universe = random_keys(3000, generator)
    for _ in range(150):
        batch = generator.permutation(universe)[: generator.integers(0, 60)]
        new = batch[index.find(batch) < 0]
        numbers = generator.integers(0, 2**40, len(new))
        index.insert(new, numbers)
        expected.update(zip(pairs(new), numbers.tolist(), strict=True))
        gone = generator.permutation(universe)[: generator.integers(0, 5)]
        index.forget(gone)
        for key in pairs(gone):
            expected.pop(key, None)
        wanted = generator.permutation(universe)[:100]
        assert index.find(wanted).tolist() == [expected.get(key, -1) for key in pairs(wanted)]
    assert index.find(universe).tolist() == [expected.get(key, -1) for key in pairs(universe)]


def test_few_runs() -> None:
    index = KeyIndex()
    keys = random_keys(20_000, np.random.default_rng(0))
    for start in range(0, len(keys), 32):
        index.insert(keys[start : start + 32], np.arange(start, min(start + 32, len(keys))))
    assert len(index._runs) <= 12
    assert sum(len(run.numbers) for run in index._runs) == len(keys)
    assert index.find(keys).tolist() == list(range(len(keys)))


def test_both_halves_count() -> None:
    index = KeyIndex()
    index.insert(np.array([[5, 1]]), np.array([3]))
    assert index.find(np.array([[5, 1], [5, 2], [1, 5], [6, 1]])).tolist() == [3, -1, -1, -1]


def test_nothing() -> None:
    index = KeyIndex()
    none = np.zeros((0, 2), np.int64)
    index.insert(none, np.zeros(0, np.int64))
    assert index.find(np.array([[1, 2]])).tolist() == [-1]
    assert index.find(none).shape == (0,)
    index.forget(np.array([[1, 2]]))
    assert index.find(np.array([[1, 2]])).tolist() == [-1]
