"""Layers that are not there, do not run, or cannot be paired."""

from __future__ import annotations

import pytest
from bad_inputs.fits import Fit, check_mistake, in_all_ways, named
from bad_inputs.networks import EvaluationNet, special, with_net
from helpers import Net, seeded
from torch import Tensor, nn
from torch.nn import functional as F


class TwiceNet(Net):
    """Runs one ReLU twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2[2](self.block2(F.max_pool2d(self.block1(x), 2))).mean((2, 3)))


MISTAKES = [
    Fit(
        "student layer misspelt",
        ValueError,
        (
            "No layer 'net.blok1' in the student (Task)",
            "Did you mean 'net.block1'",
            "Available at this depth: 'net.block1'",
        ),
        layers=named("net.blok1"),
    ),
    Fit(
        "teacher layer misspelt",
        ValueError,
        ("No layer 'blok1' in the teacher (Net)", "Did you mean 'block1'", "Available at this depth"),
        layers=named("net.block1", "blok1"),
    ),
    Fit(
        "sides swapped",
        ValueError,
        ("No layer 'net.block1' in the teacher (Net)", "exists in the student", "the two sides may be swapped"),
        layers=named("block1", "net.block1"),
    ),
    Fit(
        "glob without match",
        ValueError,
        ("Pattern 'net.layer*' matches no layer of the student (Task)", "do not match across dots", "'net.block1'"),
        layers=named("net.layer*"),
    ),
    Fit(
        "regex without match",
        ValueError,
        ("Regex 're:layer.' matches no layer of the teacher (Net)", "must match the whole name", "'block1'"),
        layers=named("net.block1", "re:layer."),
    ),
    Fit(
        "regex invalid",
        ValueError,
        ("Invalid regex 'net.('", "unterminated subpattern at position 4", "leave out 're:'"),
        layers=named("re:net.("),
    ),
    Fit(
        "different counts",
        ValueError,
        ("2 student layers but 1 teacher", "Student: 'net.block1', 'net.block2'", "Teacher: 'block1'", "Narrow"),
        layers=named("net.block?"),
    ),
    Fit(
        "index too low",
        ValueError,
        ("Index -30", "in the student", "10 recordable layers", "[-10, 9]"),
        layers={-30: -1},
    ),
    Fit("index too high", ValueError, ("Index 99", "in the teacher", "[-10, 9]"), layers={"net.block1": 99}),
    Fit(
        "duplicate pair",
        ValueError,
        ("'net.block1' -> 'block1' is named twice", "double its weight", "Remove one"),
        layers=[("net.block1", "block1"), "block1"],
    ),
    Fit("empty mapping", ValueError, ("at least one layer pair", "got {}", '"auto"'), layers={}),
    Fit("empty list", ValueError, ("at least one layer pair", "got []", '"auto"'), layers=[]),
    Fit("no layers", TypeError, ("a name, an index, a pair", "None of type NoneType"), layers=None),
    Fit("module for a name", TypeError, ("a name, an index", "of type ReLU"), layers={nn.ReLU(): "block1"}),
    Fit("three in a pair", TypeError, ("a pair (student, teacher)", "of type tuple"), layers=[("a", "b", "c")]),
    Fit("word on one side", ValueError, ('"auto" chooses the layers of both sides', "by itself"), layers=named("auto")),
    Fit(
        "parameter",
        ValueError,
        ("'net.block1.0.weight'", "Parameter of shape (4, 1, 3, 3), not a module", "Name the module that owns it"),
        layers=named("net.block1.0.weight"),
    ),
    Fit(
        "container never called",
        ValueError,
        ("'net.parts' (ModuleList)", "a container that is never called", "Name a child: 'net.parts.0'"),
        layers=named("net.parts"),
        task=special(),
    ),
    Fit(
        "layer that does not run",
        ValueError,
        ("'net.unused' (Linear)", "did not run in this forward", "Likely causes", "Name a layer that runs"),
        layers=named("net.unused"),
        task=special(),
    ),
    Fit(
        "layer that runs in evaluation alone",
        RuntimeError,
        (
            "student layer 'net.block1' did not run in this forward nor in any before",
            "skipped in training",
            "choose a layer",
        ),
        task=lambda: with_net(EvaluationNet),
    ),
    Fit(
        "layer that runs twice",
        ValueError,
        ("'net.block2.2' (ReLU)", "ran 2 times in one forward", "such as 'net.block2'"),
        layers=named("net.block2.2"),
        task=lambda: with_net(TwiceNet),
    ),
    Fit(
        "layer outside the root",
        ValueError,
        (
            "'net.unused' (Linear) did not run: the forward of 'net.parts.0' was traced, and the layer is not inside",
            "`student_root`",
        ),
        layers=named("net.unused", "0"),
        options={"student_root": "net.parts.0"},
        task=special(),
        teacher=lambda task: seeded(1, nn.Sequential, nn.Linear(8, 8)),
    ),
    Fit(
        "root misspelt",
        ValueError,
        ("`student_root`", "the student (Task)", "'nett'", "Its children: ['net']"),
        options={"student_root": "nett"},
    ),
    Fit(
        "layers before all that is trained",
        RuntimeError,
        ("term is constant", "['net.block1:input']", "requires a gradient", "Unfreeze the layers, choose others"),
        layers=named("net.block1:input"),
    ),
]


@pytest.mark.parametrize(("case", "way"), in_all_ways(MISTAKES))
def test_choices_of_layers(case: Fit, way: str) -> None:
    check_mistake(case, way)
