"""Wrong options of the term, its schedules and its layer pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_inputs.fits import INF, NAN, Error
from bad_inputs.messages import assert_message
from helpers import LAYERS, Net, make_task
from torch import nn

from lightning_otrt import CosineDecay, LayerPair, LinearWarmup, OTRTCallback, OTRTModule


def callback(**options: Any) -> OTRTCallback:
    return OTRTCallback(Net(4), **{"layers": LAYERS, **options})


ARGUMENTS: list[tuple[str, Callable[[Path], Any], Error, tuple[str, ...]]] = [
    ("weight negative", lambda _: callback(weight=-1), ValueError, ("`weight`", "not negative", "-1")),
    ("weight NaN", lambda _: callback(weight=NAN), ValueError, ("`weight`", "finite", "nan")),
    ("weight a string", lambda _: callback(weight="8"), TypeError, ("`weight`", "number", "str")),
    (
        "epsilon zero",
        lambda _: callback(epsilon=0),
        ValueError,
        ("`epsilon`", "between 0 and 1", "relative to the mean"),
    ),
    (
        "epsilon negative",
        lambda _: callback(epsilon=-0.1),
        ValueError,
        ("`epsilon`", "-0.1", "0.01 is close to an exact"),
    ),
    ("epsilon NaN", lambda _: callback(epsilon=NAN), ValueError, ("`epsilon`", "nan")),
    (
        "epsilon of a uniform plan",
        lambda _: callback(epsilon=5.0),
        ValueError,
        ("`epsilon`", "at 1 the plan is uniform"),
    ),
    (
        "plan unknown",
        lambda _: callback(plan="emd"),
        ValueError,
        ("`plan`", "'sinkhorn', 'exact', 'identity'", "'emd'"),
    ),
    (
        "cost unknown",
        lambda _: callback(cost="cosine"),
        ValueError,
        ("`cost`", "'correlation', 'euclidean'", "'cosine'"),
    ),
    (
        "cost of a rotation",
        lambda _: callback(plan="orthogonal", cost="euclidean"),
        ValueError,
        ("plan='orthogonal'", "cost='euclidean'", "follow from correlations", 'cost="covariance"'),
    ),
    (
        "cost of a rotation for a plan",
        lambda _: callback(cost="covariance"),
        ValueError,
        ('cost="covariance"', "plan='sinkhorn'", 'plan="orthogonal"'),
    ),
    ("cost no function", lambda _: callback(cost=2), TypeError, ("`cost`", "or a callable", "int")),
    ("memory of one", lambda _: callback(memory=1.0), ValueError, ("`memory`", "[0, 1)", '`plan="static"` keeps one')),
    ("solve_every zero", lambda _: callback(solve_every=0), ValueError, ("`solve_every`", "positive integer", "0")),
    (
        "root a number",
        lambda _: callback(student_root=3),
        TypeError,
        ("`student_root`", "3 of type int", "such as 'net'"),
    ),
    (
        "root a module",
        lambda _: callback(student_root=nn.Identity()),
        TypeError,
        ("`student_root`", "Identity() of type Identity", "pass its name"),
    ),
    ("grid zero", lambda _: callback(grid=0), ValueError, ("`grid`", "positive integer", "0")),
    ("seed a string", lambda _: callback(seed="1"), TypeError, ("`seed`", "an integer", "'1'")),
    ("strict a string", lambda _: callback(strict="no"), TypeError, ("`strict`", "True or False", "'no'")),
    ("global_batch a string", lambda _: callback(global_batch="yes"), TypeError, ("`global_batch`", "'yes'")),
    ("schedule no function", lambda _: callback(schedule=0.5), TypeError, ("`schedule`", "callable", "float")),
    ("warm-up of no steps", lambda _: LinearWarmup(0), ValueError, ("`steps`", "at least 1")),
    ("decay to NaN", lambda _: CosineDecay(5, final=NAN), ValueError, ("`final`", "finite", "nan")),
    (
        "adapter no function",
        lambda _: callback(teacher_inputs=[1]),
        TypeError,
        ("`teacher_inputs`", "callable", "list"),
    ),
    ("teacher dtype", lambda _: callback(teacher_dtype="int8"), ValueError, ("`teacher_dtype`", "'bf16'", "'int8'")),
    (
        "option misspelt",
        lambda _: callback(wieght=2),
        TypeError,
        ("OTRTCallback got an unexpected keyword argument 'wieght'", "Did you mean 'weight'?"),
    ),
    (
        "option misspelt, of the wrapper",
        lambda _: OTRTModule(make_task(), Net(4), student_rot="net"),
        TypeError,
        ("OTRTModule got an unexpected keyword argument 'student_rot'", "Did you mean 'student_root'?"),
    ),
    (
        "option of another name",
        lambda _: callback(lr=2),
        TypeError,
        ("OTRTCallback got an unexpected keyword argument 'lr'", "Its options: ['weight', 'student_root'"),
    ),
    (
        "option of the distillation",
        lambda _: callback(temperature=4),
        TypeError,
        ("unexpected keyword argument 'temperature'", "distillation=LogitDistillation(temperature=...)"),
    ),
    ("no layers", lambda _: OTRTCallback(Net(4), layers=[]), ValueError, ("`layers`", "at least one layer pair")),
    ("layers of None", lambda _: OTRTCallback(Net(4), layers=None), TypeError, ("`layers`", "None")),
    ("pair weight zero", lambda _: LayerPair("a", "b", 0), ValueError, ("`weight`", "'a' -> 'b'", "positive")),
    (
        "pair weight negative",
        lambda _: LayerPair("a", "b", -2),
        ValueError,
        ("`weight`", "'a' -> 'b'", "positive", "-2"),
    ),
    ("pair weight infinite", lambda _: LayerPair("a", "b", INF), ValueError, ("'a' -> 'b'", "finite", "inf")),
    (
        "pair of a module",
        lambda _: LayerPair(nn.Identity(), "b"),
        TypeError,
        ("`student`", "name of a layer", "Identity()"),
    ),
    ("pair axis", lambda _: LayerPair("a", "b", neuron_axis="1"), TypeError, ("`neuron_axis`", "'a' -> 'b'", "'1'")),
]


@pytest.mark.parametrize(
    ("call", "error", "words"), [case[1:] for case in ARGUMENTS], ids=[case[0] for case in ARGUMENTS]
)
def test_options(call: Callable[[Path], Any], error: Error, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(error) as raised:
        call(tmp_path)
    assert type(raised.value) is error
    assert_message(raised.value, words)
