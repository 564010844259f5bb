"""What a network computes besides its tensors: other code is another network, in each process the same text."""

from __future__ import annotations

import contextlib
import copy
import fractions
import functools
import importlib
import io
import operator
import os
import pickle
import random
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt.teacher.frozen.plain_facts import plain_facts

SCALE = 2.0


class Pooling(Enum):
    MEAN = 1
    MAX = 2


class Settings:
    __slots__ = ("depth",)

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.depth


class Net(nn.Module):
    """Uses whatever it was given."""

    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return self.held(x) * SCALE


def clamped(low: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.clamp_min(low)


def normalise(mean: float | None, scale: float | None) -> Callable[[Tensor], Tensor]:
    return lambda x: (x if mean is None else x - mean) * (1.0 if scale is None else scale)


def decorated(function: Callable[[Tensor], Tensor], times: int) -> Callable[[Tensor], Tensor]:
    for _ in range(times):
        function = twice(function)
    return function


def twice(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(function(x))


def made(code: str) -> nn.Module:
    """A network whose class has this code."""
    names: dict[str, Any] = {"nn": nn, "F": F, "__name__": "somewhere"}
    exec(code, names)
    net: nn.Module = names["Net"]()
    return net


CODE = """
FACTOR = 1.0

def scaled(x):
    return x * FACTOR

class Net(nn.Module):
    width = 3

    def forward(self, x):
        return self.inner(x)

    def inner(self, x):
        return scaled(F.relu(x))
"""
#: Each changes what is computed.
EDITS = {
    "a constant": ("FACTOR = 1.0", "FACTOR = 2.0"),
    "a function that is called": ("x * FACTOR", "x + FACTOR"),
    "another function of torch": ("F.relu", "F.gelu"),
    "a method": ("return scaled", "x = -x\n        return scaled"),
    "an attribute of the class": ("width = 3", "width = 4"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_code(edit: str) -> None:
    before, after = EDITS[edit]
    assert plain_facts(made(CODE)) == plain_facts(made(CODE))
    assert plain_facts(made(CODE)) != plain_facts(made(CODE.replace(before, after)))


@pytest.mark.parametrize("helpers", [1, 8, 400])
def test_code_at_the_end_of_a_long_way(helpers: int) -> None:
    way = [f"def help{i}(x):\n    return help{i + 1}(x)\n" for i in range(helpers)]
    code = "\n".join([*way, f"def help{helpers}(x):\n    return x + 1\n", CODE.replace("x * FACTOR", "help0(x)")])
    assert plain_facts(made(code)) == plain_facts(made(code))
    assert plain_facts(made(code)) != plain_facts(made(code.replace("x + 1", "x + 2")))


def test_names_of_equal_functions_that_change_places() -> None:
    code = """
def plus(number):
    def add(x):
        return x + number
    return add

first, second = plus(1), plus(2)
"""
    code += CODE.replace("x * FACTOR", "first(x) * 3 + second(x)")
    assert plain_facts(made(code)) == plain_facts(made(code))
    assert plain_facts(made(code)) != plain_facts(made(code.replace("plus(1), plus(2)", "plus(2), plus(1)")))


@pytest.mark.parametrize("changed", ["x + 1", "x * 2"])
def test_equal_names_in_two_modules(changed: str) -> None:
    """A decorator that takes over the module of what it decorates still uses the names of its own."""
    decorator = """
import functools

def helper(x):
    return x + 1

def decorated(function):
    @functools.wraps(function)
    def wrapper(x):
        return helper(function(x))
    return wrapper
"""
    code = "\ndef helper(x):\n    return x * 2\n" + CODE.replace("def scaled", "@decorated\ndef scaled")
    code = code.replace("x * FACTOR", "helper(x)")

    def facts(before: str = "", after: str = "") -> dict[str, str]:
        names: dict[str, Any] = {"__name__": "elsewhere"}
        exec(decorator.replace(before, after), names)
        inner: dict[str, Any] = {"nn": nn, "F": F, "__name__": "somewhere", "decorated": names["decorated"]}
        exec(code.replace(before, after), inner)
        return plain_facts(inner["Net"]())

    assert facts() == facts()
    assert facts() != facts(changed, f"{changed} + 3")


def test_functions_that_call_each_other() -> None:
    code = CODE.replace("x * FACTOR", "scaled(x - 1) if x else even(x)") + "\ndef even(x):\n    return scaled(x) + 1\n"
    assert plain_facts(made(code)) == plain_facts(made(code))
    assert plain_facts(made(code)) != plain_facts(made(code.replace("scaled(x) + 1", "scaled(x) + 2")))


def test_where_code_stands_does_not_count() -> None:
    assert plain_facts(made(CODE)) == plain_facts(made("\n\n# moved\n" + CODE))


VALUES: dict[str, tuple[Any, Any]] = {
    "numbers": (1, 2),
    "a number and a fraction": (1, 1.0),
    "texts": ("mean", "max"),
    "enums": (Pooling.MEAN, Pooling.MAX),
    "types": (torch.float32, torch.float64),
    "lists": ([1, [2]], [1, [3]]),
    "a list and a tuple": ([1], (1,)),
    "sets": ({1, 2}, {1, 3}),
    "mappings": ({"a": {"b": 1}}, {"a": {"b": 2}}),
    "slots": (Settings(1), Settings(2)),
    "functions": (F.relu, F.gelu),
    "closures": (clamped(0.0), clamped(1.0)),
    "closures over None": (normalise(None, 2.0), normalise(2.0, None)),
    "many decorators": (decorated(clamped(0.0), 20), decorated(clamped(1.0), 20)),
    "defaults by name": (lambda x, *, low=0, high=None: x, lambda x, *, low=None, high=0: x),
    "defaults": (lambda x, low=0: x + low, lambda x, low=1: x + low),
    "methods": (nn.Module.eval, nn.Module.train),
    "classes": (nn.ReLU, nn.GELU),
    "networks in a list": ([nn.Dropout(0.1)], [nn.Dropout(0.2)]),
    "numbers of NumPy": (np.int64(1), np.int64(2)),
    "fractions of NumPy": (np.float16(0.5), np.float16(0.25)),
    "methods of objects": (Settings(1).scaled, Settings(2).scaled),
    "functions with a cache": (functools.lru_cache(clamped(0.0)), functools.lru_cache(clamped(1.0))),
    "getters": (operator.itemgetter(0), operator.itemgetter(1)),
    "fractions": (fractions.Fraction(1, 2), fractions.Fraction(1, 3)),
    "queues": (deque([1, 2]), deque([1, 3])),
    "paths": (Path("a"), Path("b")),
    "dates": (datetime(2026, 1, 1), datetime(2026, 1, 2)),
    "polynomials": (np.poly1d([1, 2]), np.poly1d([1, 3])),
    "distributions": (torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.0, 2.0)),
    "tensors in a list": ([torch.ones(2)], [torch.zeros(2)]),
}
#: Nothing of these is told apart: they change by themselves, or are those of the process.
SAME: dict[str, tuple[Any, Any]] = {
    "generators": (random.Random(0), random.Random(1)),
    "generators of NumPy": (np.random.default_rng(0), np.random.default_rng(1)),
    "generators of torch": (torch.Generator(), torch.Generator().manual_seed(3)),
    "locks": (threading.Lock(), threading.Lock()),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str) -> None:
    one, other = VALUES[name]
    assert plain_facts(Net(one)) == plain_facts(Net(one))
    assert plain_facts(Net(one)) != plain_facts(Net(other))


@pytest.mark.parametrize("name", SAME)
def test_what_is_not_told_apart(name: str) -> None:
    one, other = SAME[name]
    assert plain_facts(Net(one)) == plain_facts(Net(other))


def test_hyperparameters() -> None:
    class Module(pl.LightningModule):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.save_hyperparameters()
            self._secret = 1

    module = Module(1.0)
    before = plain_facts(module)
    assert before == plain_facts(Module(1.0)) != plain_facts(Module(2.0))
    module._secret = 2
    assert plain_facts(module) != before


@pytest.mark.parametrize("use", ["helpers.scaled(x)", "scaled(x)", "Scaler()(x)", "helpers.Scaler()(x)"])
def test_code_in_another_file(use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the user: that of packages which are installed is known by its name."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the files have one size, and are written in one second
    found = []
    for factor in (2, 2, 3):
        (tmp_path / "helpers_of_test.py").write_text(
            f"def scaled(x):\n    return {factor} * x\n\n\nclass Scaler:\n    __call__ = lambda self, x: {factor} * x\n"
        )
        sys.modules.pop("helpers_of_test", None)
        importlib.invalidate_caches()
        helpers = importlib.import_module("helpers_of_test")
        importlib.reload(helpers)
        names = {"nn": nn, "helpers": helpers, "scaled": helpers.scaled, "Scaler": helpers.Scaler, "__name__": "main_"}
        exec(f"class Net(nn.Module):\n    def forward(self, x):\n        return {use}\n", names)
        found.append(plain_facts(names["Net"]()))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("options", [{"nhead": 4}, {"activation": "gelu"}, {"norm_first": True}])
def test_layers_whose_repr_does_not_tell(options: dict[str, Any]) -> None:
    net = nn.TransformerEncoderLayer(8, **{"nhead": 2, **options})
    assert plain_facts(net) == plain_facts(copy.deepcopy(net))
    assert plain_facts(net) != plain_facts(nn.TransformerEncoderLayer(8, 2))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_is_the_same(how: Callable[[nn.Module], nn.Module]) -> None:
    """Also where one object stands in several places, which a copy may hold several times."""
    pair = (1, 2)
    net = nn.Sequential(Net([pair, pair]), Net(pair), Net(Settings(3)), nn.TransformerEncoderLayer(8, 2))
    assert plain_facts(how(net)) == plain_facts(net)


def test_values_that_hold_themselves() -> None:
    held: list[Any] = [1]
    held.append(held)
    other: list[Any] = [2]
    other.append(other)
    assert plain_facts(Net(held)) == plain_facts(Net(held))
    assert plain_facts(Net(held)) != plain_facts(Net(other))


def test_what_lightning_keeps_does_not_count() -> None:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.net = 2, nn.Linear(2, 2)

    module = Module()
    before = plain_facts(module)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False)
    module.trainer = trainer
    assert plain_facts(module) == before
    module.scale = 3
    assert plain_facts(module) != before


FACTS = """
import hashlib, torch
from fractions import Fraction
from operator import itemgetter
from torch.distributions import Normal
from lightning_otrt.teacher.frozen.plain_facts import plain_facts
net = torch.nn.TransformerEncoderLayer(8, 2)
net.lag, net.range, net.getter = Fraction(1, 3), Normal(0.0, 2.0), itemgetter(1)
net.config = {"names": set("abcdef"), "act": lambda x: x + 1 if x in {"t", "u", "v", "w", "x", "y"} else x}
print(hashlib.sha256(repr(sorted(plain_facts(net).items())).encode()).hexdigest())
"""


@pytest.mark.slow
def test_processes_agree() -> None:
    """Each has a seed of its own for the hashes of strings, and so another order of sets."""
    other = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FACTS],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    with contextlib.redirect_stdout(io.StringIO()) as own:
        exec(compile(FACTS, "<string>", "exec"), {"__name__": "__main__"})
    assert own.getvalue() == other.stdout


class Answers:
    """Has an answer, or an error, for each name."""

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


def test_objects_that_raise_for_a_name() -> None:
    assert plain_facts(Net(Answers())) == plain_facts(Net(Answers()))
