"""What a network computes besides its tensors: other code is another network, in each process the same text."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_otrt.teacher.cache.plain_facts import plain_facts

SCALE = 2.0


class Pooling(Enum):
    MEAN = 1
    MAX = 2


class Settings:
    __slots__ = ("depth",)

    def __init__(self, depth: int) -> None:
        self.depth = depth


class Net(nn.Module):
    """Uses whatever it was given."""

    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return self.held(x) * SCALE


def clamped(low: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.clamp_min(low)


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
    "defaults": (lambda x, low=0: x + low, lambda x, low=1: x + low),
    "methods": (nn.Module.eval, nn.Module.train),
    "classes": (nn.ReLU, nn.GELU),
    "networks in a list": ([nn.Dropout(0.1)], [nn.Dropout(0.2)]),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str) -> None:
    one, other = VALUES[name]
    assert plain_facts(Net(one)) == plain_facts(Net(one))
    assert plain_facts(Net(one)) != plain_facts(Net(other))


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
from lightning_otrt.teacher.cache.plain_facts import plain_facts
net = torch.nn.TransformerEncoderLayer(8, 2)
net.config = {"names": set("abcdef"), "act": lambda x: x + 1 if x in {"t", "u", "v", "w", "x", "y"} else x}
print(hashlib.sha256(repr(sorted(plain_facts(net).items())).encode()).hexdigest())
"""


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
