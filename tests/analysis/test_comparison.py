"""The result of a comparison: pairing, closest layers, plans, figure and table, from distances that are known."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor

from lightning_otrt.analysis.comparison import RepresentationComparison, Values
from lightning_otrt.analysis.metric import NeuronTransportDistance

STUDENTS, TEACHERS = ("a", "b"), ("x", "y", "z")
#: Relative to chance ``a`` is closest to ``z`` alone; ``b`` and ``y`` cannot be compared.
RELATIVE = torch.tensor([[0.3, 0.4, 0.1], [0.9, math.nan, 0.2]])
#: By chance ``x`` is close to everything, so that the distances alone point at it.
CHANCE = torch.tensor([[0.1, 0.8, 0.8], [0.1, math.nan, 0.8]])
DISTANCES = RELATIVE * CHANCE
NOT_POOLED = torch.zeros(2, 3, dtype=torch.bool)


@pytest.fixture
def result() -> RepresentationComparison:
    statistics = {}
    teacher = torch.randn(3, 40)
    for row, student in enumerate(STUDENTS):
        for column, name in enumerate(TEACHERS):
            if not DISTANCES[row, column].isnan():
                metric = statistics[student, name] = NeuronTransportDistance(3, 3, plan="exact")
                metric.update(teacher[[1, 2, 0]], teacher)
    return RepresentationComparison(DISTANCES, CHANCE, NOT_POOLED, STUDENTS, TEACHERS, 40, statistics)


def test_pairing_is_in_order_and_closest_is_not(result: RepresentationComparison) -> None:
    assert result.pairing == (("a", "x"), ("b", "z")), "0.5 in all; a with z would leave b without a later partner"
    assert result.as_layers() == {"a": "x", "b": "z"}
    assert result.closest == {"a": "z", "b": "z"}


def test_distances_go_over_those_by_chance(result: RepresentationComparison) -> None:
    assert DISTANCES[0].argmin() == 0, "by the distances alone a would be closest to x"
    torch.testing.assert_close(result.relative, RELATIVE, equal_nan=True)


def test_a_layer_without_positions_comes_after_layers_with_positions(result: RepresentationComparison) -> None:
    """A map against a vector is the mean of the map against it, which is another layer."""
    pooled = NOT_POOLED.clone()
    pooled[:, 2] = True
    assert replace(result, pooled=pooled).closest == {"a": "x", "b": "x"}
    assert replace(result, pooled=pooled).pairing == (("a", "x"), ("b", "z")), "a partner for each comes first"
    assert replace(result, pooled=~NOT_POOLED).closest == result.closest, "where all are, none comes first"


def test_prints_a_table(result: RepresentationComparison) -> None:
    """Of distances over those by chance, where closest layers are marked and "-" cannot be compared."""
    assert str(result).splitlines() == [
        "Transport distance over that by chance, 40 samples; * is the closest teacher layer",
        "      x      y      z",
        "a  0.30   0.40   0.10*",
        "b  0.90      -   0.20*",
    ]


def test_plans(result: RepresentationComparison) -> None:
    assert list(result.plans()) == [("a", "x"), ("b", "z")]
    assert result.plans()["b", "z"].argmax(1).tolist() == [1, 2, 0]
    found = result.transport("a", "y")
    assert found.plan.dtype == torch.float64
    assert float(found.value) == pytest.approx(0, abs=1e-9)
    assert all(metric._computed is None for metric in result.statistics.values()), "no plan is kept"


def test_layers_that_cannot_be_compared(result: RepresentationComparison) -> None:
    with pytest.raises(ValueError, match="'b' and the teacher layer 'y' cannot be compared: one gives a map and the"):
        result.transport("b", "y")
    with pytest.raises(KeyError, match=r"'c' is none of the student layers that were compared: \['a', 'b'\]"):
        result.transport("c", "y")
    with pytest.raises(KeyError, match="'c' is none of the teacher layers"):
        result.transport("a", "c")


def test_nothing_can_be_compared() -> None:
    nan = torch.full((1, 2), math.nan)
    nothing = RepresentationComparison(nan, nan, torch.zeros(1, 2).bool(), ("a",), ("x", "y"), 8, {})
    assert nothing.pairing == ()
    assert nothing.closest == nothing.plans() == nothing.as_layers() == {}


def test_plot(result: RepresentationComparison) -> None:
    figure, axes = result.plot()
    assert [label.get_text() for label in axes.get_yticklabels()] == list(STUDENTS)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(TEACHERS)
    assert figure.axes[0].images[0].colorbar.ax.get_ylabel() == "transport distance / that by chance"
    pyplot.close(figure)


@pytest.mark.parametrize(("values", "expected"), [("distances", DISTANCES), ("chance", CHANCE), ("relative", RELATIVE)])
def test_values_that_are_drawn_and_listed(result: RepresentationComparison, values: Values, expected: Tensor) -> None:
    figure, axes = result.plot(values=values)
    drawn = torch.as_tensor(np.ma.filled(axes.images[0].get_array(), math.nan))
    torch.testing.assert_close(drawn.float(), expected, equal_nan=True)
    pyplot.close(figure)
    pytest.importorskip("pandas")
    torch.testing.assert_close(torch.tensor(result.to_dataframe(values).to_numpy()), expected, equal_nan=True)


def test_values_that_there_are_not(result: RepresentationComparison) -> None:
    with pytest.raises(
        ValueError, match=r"`values` to be one of \['relative', 'distances', 'chance'\], but got 'plans'"
    ):
        result.plot(values="plans")  # type: ignore[arg-type]


def test_dataframe(result: RepresentationComparison) -> None:
    pytest.importorskip("pandas")
    frame = result.to_dataframe()
    assert frame.loc["b", "z"] == pytest.approx(0.2)
    assert (frame.index.name, frame.columns.name) == ("student", "teacher")


def test_dataframe_without_pandas(result: RepresentationComparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="`to_dataframe` needs pandas: pip install pandas"):
        result.to_dataframe()


def test_is_frozen_and_short_to_show(result: RepresentationComparison) -> None:
    with pytest.raises(AttributeError):
        result.samples = 0  # type: ignore[misc]
    assert repr(result) == "RepresentationComparison(2 student layers, 3 teacher layers, 40 samples)"
