"""The result of a comparison: pairing, closest layers, plans, figure and table, from distances that are known."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from matplotlib import pyplot

from lightning_otrt.analysis.comparison import RepresentationComparison
from lightning_otrt.analysis.metric import NeuronTransportDistance

STUDENTS, TEACHERS = ("a", "b"), ("x", "y", "z")
#: ``a`` is closest to ``z`` alone; ``b`` and ``y`` cannot be compared.
DISTANCES = torch.tensor([[0.3, 0.4, 0.1], [0.9, math.nan, 0.2]])


@pytest.fixture
def result() -> RepresentationComparison:
    statistics = {}
    teacher = torch.randn(3, 40)
    for row, student in enumerate(STUDENTS):
        for column, name in enumerate(TEACHERS):
            if not DISTANCES[row, column].isnan():
                metric = statistics[student, name] = NeuronTransportDistance(3, 3, plan="exact")
                metric.update(teacher[[1, 2, 0]], teacher)
    return RepresentationComparison(DISTANCES, STUDENTS, TEACHERS, 40, statistics)


def test_pairing_is_in_order_and_closest_is_not(result: RepresentationComparison) -> None:
    assert result.pairing == (("a", "x"), ("b", "z")), "0.5 in all; a with z would leave b without a later partner"
    assert result.as_layers() == {"a": "x", "b": "z"}
    assert result.closest == {"a": "z", "b": "z"}


def test_plans(result: RepresentationComparison) -> None:
    assert list(result.plans) == [("a", "x"), ("b", "z")]
    assert result.plans["b", "z"].argmax(1).tolist() == [1, 2, 0]
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
    nothing = RepresentationComparison(torch.full((1, 2), math.nan), ("a",), ("x", "y"), 8, {})
    assert nothing.pairing == ()
    assert nothing.closest == nothing.plans == nothing.as_layers() == {}


def test_plot(result: RepresentationComparison) -> None:
    figure, axes = result.plot()
    assert [label.get_text() for label in axes.get_yticklabels()] == list(STUDENTS)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(TEACHERS)
    pyplot.close(figure)


def test_dataframe(result: RepresentationComparison) -> None:
    pytest.importorskip("pandas")
    frame = result.to_dataframe()
    assert frame.loc["b", "z"] == pytest.approx(0.2)
    assert (frame.index.name, frame.columns.name) == ("student", "teacher")


def test_dataframe_without_pandas(result: RepresentationComparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="`to_dataframe` needs pandas: pip install pandas"):
        result.to_dataframe()


def test_is_frozen_and_short_to_print(result: RepresentationComparison) -> None:
    with pytest.raises(AttributeError):
        result.samples = 0  # type: ignore[misc]
    assert "Metric" not in repr(result)
