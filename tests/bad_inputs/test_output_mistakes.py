"""Layers whose outputs are no representation, or cannot be matched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_inputs.fits import Fit, check_mistake, in_all_ways, named
from bad_inputs.networks import Grid, RowTokens, SpecialNet, Tokens, special, with_net
from helpers import seeded
from torch import Tensor, nn


def kind_of(output: str, make: Callable[[Tensor], Any], *words: str) -> Fit:
    """A student layer that gives no representation."""
    expected = ("Student layer 'net.special' (Special)", *words)
    return Fit(f"output {output}", ValueError, expected, layers=named("net.special"), task=special(make))


MISTAKES = [
    kind_of("a tuple", lambda y: (y, y), "tuple(float32 (8, 4, 8, 8), float32", "LayerPair(..., select=0)", "[0, 1]"),
    kind_of(
        "a dictionary",
        lambda y: {"a": y, "b": 1},
        "dict(a: float32 (8, 4, 8, 8), b: int)",
        "LayerPair(..., select='a')",
    ),
    kind_of("a list of boxes", lambda y: [{"boxes": y}], "list(dict)", "holds no tensor to record"),
    kind_of("a string", lambda y: "words", "returns str", "holds no tensor to record"),
    kind_of("integers", lambda y: y.argmax(1), "int64 of shape (8, 8, 8)", "a real floating-point tensor"),
    kind_of("booleans", lambda y: y > 0, "bool of shape (8, 4, 8, 8)", "a real floating-point tensor"),
    kind_of("complex", lambda y: torch.complex(y, y), "complex64 of shape (8, 4, 8, 8)", "a real floating-point"),
    kind_of("0-D", lambda y: y.mean(), "float32 of shape ()", "(batch, neurons, ...)", "Name an earlier layer"),
    kind_of("1-D", lambda y: y.mean((1, 2, 3)), "float32 of shape (8,)", "(batch, neurons, ...)"),
    Fit(
        "teacher output of integers",
        ValueError,
        ("Teacher layer 'special' (Special)", "int64 of shape (8, 8, 8)", "a real floating-point tensor"),
        layers=named("net.block1", "special"),
        teacher=lambda task: seeded(1, SpecialNet, lambda y: y.argmax(1)),
    ),
    Fit(
        "teacher output of a dictionary",
        ValueError,
        ("Teacher layer 'special' (Special)", "dict(a: float32 (8, 4, 8, 8))", "LayerPair(..., select='a')"),
        layers=named("net.block1", "special"),
        teacher=lambda task: seeded(1, SpecialNet, lambda y: {"a": y}),
    ),
    Fit(
        "output with ambiguous axes",
        ValueError,
        ("Student layer 'net.gate' (Gate) of shape (8, 8, 8, 8)", "ambiguous neuron axis", "1 for (B, C, ...), -1 for"),
        layers=named("net.gate", "gate"),
        task=lambda: with_net(Grid),
        teacher=lambda task: seeded(1, Grid),
    ),
    Fit(
        "neuron axis that of the samples",
        ValueError,
        ("'net.block1' (Sequential)", "(8, 4, 8, 8)", "`neuron_axis` 0 is the axis of the samples"),
        layers=named("net.block1", neuron_axis=0),
    ),
    Fit(
        "neuron axis out of range",
        ValueError,
        ("'net.block1' (Sequential)", "[-4, 3]", "got 9"),
        layers=named("net.block1", neuron_axis=9),
    ),
    Fit(
        "select what is not there",
        ValueError,
        ("'net.special' (Special)", "without a tensor at select='c'", "among ['a', 'b']"),
        layers=named("net.special", select="c"),
        task=special(lambda y: {"a": y, "b": y}),
    ),
    Fit(
        "select from a tensor",
        ValueError,
        ("select='a' chooses nothing for 'net.block1' -> 'block1'", "Remove `select`"),
        layers=named("net.block1", select="a"),
    ),
    Fit(
        "samples folded into the batch",
        ValueError,
        ("'net.special' -> 'block1'", "batch sizes differ", "(32, 4, 4, 4)", "(8, 6, 4, 4)", "fold positions"),
        layers=named("net.special", neuron_axis=1),
        task=special(lambda y: y.flatten(0, 1)[:, None].expand(-1, 4, -1, -1)),
    ),
    Fit(
        "map with a sequence",
        ValueError,
        ("'net.block1' -> 'special'", "positions cannot be paired", "one side is a map and the other a sequence"),
        layers=named("net.block1", "special", neuron_axis=1),
        teacher=lambda task: seeded(1, SpecialNet, lambda y: y.flatten(2)),
    ),
    Fit(
        "grid of tokens with a row of tokens",
        ValueError,
        ("'net.norm' -> 'norm'", "positions cannot be paired", "one side is a map and the other a sequence"),
        layers=named("net.norm", "norm"),
        task=lambda: with_net(Tokens),
        teacher=lambda task: seeded(1, RowTokens),
    ),
    Fit(
        "no classification head",
        ValueError,
        ("No classification head", "the teacher (Sequential)", "Name the layer"),
        layers="penultimate",
        teacher=lambda task: seeded(1, nn.Sequential, nn.Conv2d(1, 4, 3), nn.ReLU()),
    ),
    Fit(
        "two widths for the identity",
        ValueError,
        ('plan="identity"', "'net.block1' -> 'block1' has 4 student and 6 teacher", 'Use plan="sinkhorn"'),
        options={"plan": "identity"},
    ),
]


@pytest.mark.parametrize(("case", "way"), in_all_ways(MISTAKES))
def test_outputs_of_layers(case: Fit, way: str) -> None:
    check_mistake(case, way)
