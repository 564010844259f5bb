"""The pairing in order of least distance, against all pairings."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_otrt.layers.order import match_in_order


@pytest.mark.parametrize("shape", [(3, 3), (2, 5), (5, 2), (1, 4), (4, 1)])
def test_is_the_best_of_all(shape):
    for _ in range(20):
        distances = torch.rand(shape)
        pairs = match_in_order(distances)
        assert len(pairs) == min(shape)
        assert sum(distances[i, j] for i, j in pairs) == pytest.approx(brute_force(distances), abs=1e-6)


def brute_force(distances):
    rows, columns = distances.shape
    count = min(rows, columns)
    return min(
        float(distances[list(i), list(j)].sum())
        for i in itertools.combinations(range(rows), count)
        for j in itertools.combinations(range(columns), count)
    )


def test_pairs_that_do_not_exist():
    distances = torch.tensor([[math.nan, 0.1], [0.2, math.nan]])
    assert match_in_order(distances) == [(0, 1)]
    assert match_in_order(torch.full((2, 2), math.nan)) == []
    assert match_in_order(torch.zeros(0, 3)) == []
