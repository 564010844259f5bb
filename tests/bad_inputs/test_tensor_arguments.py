"""Wrong tensors and options for neurons, their distance and its metric."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs.bad_costs import negative, without_gradient
from bad_inputs.fits import INF, NAN, Error
from bad_inputs.messages import assert_message
from torch import Tensor

from lightning_otrt import neurons, transport_distance
from lightning_otrt.analysis.metric import NeuronTransportDistance

Y, X = torch.randn(4, 8, generator=torch.Generator().manual_seed(5)), torch.randn(6, 8)


def maps(*shape: int, **options: Any) -> Tensor:
    return neurons(torch.zeros(shape), **options)


def update(student: Any, teacher: Any) -> None:
    NeuronTransportDistance(4, 6).update(student, teacher)


def row(y: Tensor, x: Tensor) -> Tensor:
    return (y[0] - x[0]).abs()


ARGUMENTS: list[tuple[str, Callable[[Path], Any], Error, tuple[str, ...]]] = [
    ("neurons 0-D", lambda _: maps(), ValueError, ("(batch, neurons, ...)", "got ()")),
    ("neurons 1-D", lambda _: maps(8), ValueError, ("(batch, neurons, ...)", "(8,)", "axis of samples")),
    ("neuron axis ambiguous", lambda _: maps(2, 3, 4), ValueError, ("(2, 3, 4)", "ambiguous", "`neuron_axis=1` for")),
    ("neuron axis that of samples", lambda _: maps(2, 3, neuron_axis=0), ValueError, ("(2, 3)", "its batch axis (0)")),
    ("neuron axis out of range", lambda _: maps(2, 3, neuron_axis=5), ValueError, ("`neuron_axis`", "[-2, 1]", "5")),
    ("batch axis", lambda _: maps(2, 3, batch_axis=7), ValueError, ("`batch_axis`", "(T, B, C)", "7")),
    (
        "grid of no positions",
        lambda _: maps(2, 3, 4, 4, neuron_axis=1, grid=0),
        ValueError,
        ("`grid`", "positive integer", "0"),
    ),
    ("map without positions", lambda _: maps(2, 3, 0, 4, neuron_axis=1), ValueError, ("is empty", "(2, 3, 0, 4)")),
    (
        "tokens all prefix",
        lambda _: maps(2, 5, 3, neuron_axis=-1, prefix_tokens=5),
        ValueError,
        ("No token is left", "5"),
    ),
    (
        "prefix negative",
        lambda _: maps(2, 5, 3, neuron_axis=-1, prefix_tokens=-1),
        ValueError,
        ("`prefix_tokens`", "-1"),
    ),
    (
        "mask shape",
        lambda _: maps(2, 5, 3, neuron_axis=2, mask=X[:2, :4] > 0),
        ValueError,
        ("mask", "(2, 5)", "(2, 4)"),
    ),
    (
        "mask additive",
        lambda _: maps(2, 5, 3, neuron_axis=2, mask=-X[:2, :5].abs()),
        ValueError,
        ("`mask`", "negative"),
    ),
    (
        "mask of a map",
        lambda _: maps(2, 3, 4, 4, neuron_axis=1, mask=X[:2, :4] > 0),
        ValueError,
        ("`mask`", "(2, 3, 4, 4)"),
    ),
    ("mask a list", lambda _: maps(2, 5, 3, neuron_axis=2, mask=[1]), TypeError, ("`mask`", "tensor (B, T)", "list")),
    (
        "output of integers",
        lambda _: neurons(torch.ones(2, 3).long()),
        TypeError,
        ("floating-point", "int64 (2, 3)"),
    ),
    ("output of several", lambda _: neurons((X, X)), TypeError, ("tuple(float32 (6, 8), float32 (6, 8))", "`select=`")),
    ("select nothing", lambda _: neurons({"a": X}, select="b"), ValueError, ("no 'b'", "dict(a: float32 (6, 8))")),
    ("distance of arrays", lambda _: transport_distance(Y.numpy(), X), TypeError, ("`student`", "tensor", "ndarray")),
    ("distance of integers", lambda _: transport_distance(Y, X.long()), TypeError, ("`teacher`", "torch.int64")),
    ("distance of complex", lambda _: transport_distance(Y + 0j, X), TypeError, ("`student`", "torch.complex64")),
    (
        "distance of a vector",
        lambda _: transport_distance(Y[0], X),
        ValueError,
        ("`student`", "(neurons, observ", "(8,)"),
    ),
    ("distance of nothing", lambda _: transport_distance(Y[:0], X), ValueError, ("`student`", "non-empty", "(0, 8)")),
    ("observations differ", lambda _: transport_distance(Y[:, :5], X), ValueError, ("(4, 5)", "(6, 8)", "one to one")),
    ("batch on one side", lambda _: transport_distance(Y[None], X), ValueError, ("(1, 4, 8)", "(6, 8)", "agree")),
    (
        "two observations",
        lambda _: transport_distance(Y[:, :2], X[:, :2]),
        ValueError,
        ("2 observations", "at least 3"),
    ),
    (
        "NaN neurons",
        lambda _: transport_distance(Y * NAN, X),
        ValueError,
        ("`student` has 32 NaN", "(4, 8)", "Check its"),
    ),
    ("infinite neurons", lambda _: transport_distance(Y, X * INF), ValueError, ("`teacher` has 48 NaN or infinite",)),
    ("static without training", lambda _: transport_distance(Y, X, plan="static"), ValueError, ("`plan`", "'static'")),
    (
        "identity of two widths",
        lambda _: transport_distance(Y, X, plan="identity"),
        ValueError,
        ("4 student and 6 teacher",),
    ),
    (
        "negative cost",
        lambda _: transport_distance(Y, X, cost=negative),
        ValueError,
        ("not to be negative", "Add a constant"),
    ),
    (
        "costs with an infinite mean",
        lambda _: transport_distance(Y, X, cost=lambda y, x: torch.cdist(y, x) * 0 + 3e37),
        ValueError,
        ("finite mean", "up to 3e+37", "Scale the cost"),
    ),
    ("cost of another shape", lambda _: transport_distance(Y, X, cost=row), ValueError, ("(4, 6)", "got (8,)")),
    (
        "cost without gradient",
        lambda _: transport_distance(Y, X, cost=without_gradient),
        ValueError,
        ("no gradient", "torch operations"),
    ),
    ("masses", lambda _: transport_distance(Y, X, student_mass=-X), TypeError, ("unexpected keyword", "student_mass")),
    (
        "metric of no neurons",
        lambda _: NeuronTransportDistance(0, 3),
        ValueError,
        ("`num_student_neurons`", "positive"),
    ),
    (
        "metric of any cost",
        lambda _: NeuronTransportDistance(4, 6, cost=negative),
        TypeError,
        ("`cost`", "transport_distance("),
    ),
    ("metric transposed", lambda _: update(Y.T, X.T), ValueError, ("4 neurons", "(8, 4)", "Transpose it")),
    ("metric of NaN", lambda _: update(Y, X * NAN), ValueError, ("`teacher` has 48 NaN",)),
    ("metric of unpaired", lambda _: update(Y[:, :3], X), ValueError, ("(4, 3)", "(6, 8)", "one to one")),
    ("metric's plan too early", lambda _: NeuronTransportDistance(4, 6).transport(), ValueError, ("`update` first",)),
]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize(
    ("call", "error", "words"), [case[1:] for case in ARGUMENTS], ids=[case[0] for case in ARGUMENTS]
)
def test_tensors(call: Callable[[Path], Any], error: Error, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(error) as raised:
        call(tmp_path)
    assert type(raised.value) is error
    assert_message(raised.value, words)
