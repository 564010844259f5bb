"""Intervals, paired tests and Holm's correction against hand-computed figures and scipy."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from benchmarks.evidence.statistics import compare, estimate, holm, paired_p


def test_interval_by_hand() -> None:
    # Mean 3, standard deviation sqrt(2.5), t(0.975, 4) = 2.776.
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half_width == pytest.approx(2.7764451 * math.sqrt(2.5 / 5), rel=1e-6)
    assert f"{found}" == "3.0 ± 2.0"


def test_interval_of_one_value_is_unknown() -> None:
    assert math.isnan(estimate([4.0]).half_width)
    assert f"{estimate([4.0])}" == "4.0"


def test_holm_by_hand() -> None:
    # 0.01 x 4, 0.02 x 3, then 0.03 x 2 = 0.06 and 0.04 x 1, which must not be smaller than the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_is_at_most_one_and_keeps_one_value() -> None:
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_paired_test_is_that_of_scipy() -> None:
    one, other = [50.0, 52.0, 49.0, 55.0], [48.0, 51.0, 50.0, 50.0]
    differences = [a - b for a, b in zip(one, other, strict=True)]
    assert paired_p(differences) == pytest.approx(stats.ttest_rel(one, other).pvalue)


def test_paired_test_without_spread() -> None:
    assert paired_p([1.0]) == 1
    assert paired_p([0.0, 0.0]) == 1
    assert paired_p([2.0, 2.0]) == 0


def test_comparisons_are_paired_by_seed_and_corrected_as_one_family() -> None:
    ours = {0: 60.0, 1: 62.0, 2: 61.0}
    others = {"a": {1: 50.0, 0: 49.0, 2: 52.0}, "b": {0: 59.0, 1: 62.5}, "c": {7: 1.0}}
    found = compare(ours, others)
    assert set(found) == {"a", "b"}
    assert found["a"].gain.mean == pytest.approx((11 + 12 + 9) / 3)
    assert found["b"].gain.count == 2
    assert [found["a"].corrected, found["b"].corrected] == pytest.approx(holm([found["a"].p, found["b"].p]))
