"""Paired differences over seeds, with intervals, and Holm's correction for several comparisons."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from scipy import stats

Name = TypeVar("Name")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        half_width: Half the width of its 95 % interval of Student's t; NaN for one value.
        count: Number of values.
    """

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        """As in tables."""
        return f"{self.mean:.1f}" + ("" if math.isnan(self.half_width) else f" ± {self.half_width:.1f}")


@dataclass(frozen=True)
class Comparison:
    """One method against another on the same seeds.

    Attributes:
        gain: Mean paired difference, in points.
        p: Two-sided p value of the paired t test.
        corrected: The same after Holm's correction over its family.
    """

    gain: Estimate
    p: float
    corrected: float


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval."""
    if len(values) < 2:
        return Estimate(statistics.fmean(values), math.nan, len(values))
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * error, len(values))


def compare(one: Mapping[int, float], others: Mapping[str, Mapping[int, float]]) -> dict[str, Comparison]:
    """One method against each other method, a family for Holm's correction.

    Args:
        one: Accuracies by seed.
        others: The same by method; only seeds that both have are compared.
    """
    return family({name: (one, values) for name, values in others.items()})


def family(pairs: Mapping[Name, tuple[Mapping[int, float], Mapping[int, float]]]) -> dict[Name, Comparison]:
    """Comparisons that are corrected together.

    Args:
        pairs: Accuracies by seed of one method and of the other, by the name of the comparison; only seeds that both
            have are compared.
    """
    gains = {
        name: [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
        for name, (one, other) in pairs.items()
    }
    gains = {name: values for name, values in gains.items() if values}
    raw = {name: paired_p(values) for name, values in gains.items()}
    corrected = dict(zip(raw, holm(list(raw.values())), strict=True))
    return {name: Comparison(estimate(gains[name]), raw[name], corrected[name]) for name in gains}


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p value of the t test that the mean difference is 0; 1 where there is nothing to test."""
    if len(differences) < 2:
        return 1.0
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.fmean(differences)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, len(differences) - 1))


def holm(p: Sequence[float]) -> list[float]:
    """P values corrected by Holm's step-down procedure (Holm, 1979)."""
    order = sorted(range(len(p)), key=p.__getitem__)
    corrected = [0.0] * len(p)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = highest
    return corrected
