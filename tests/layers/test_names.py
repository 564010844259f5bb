"""Names of modules: wrappers are left out, second names are kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from lightning_otrt.layers.names import child_names, has_layers, named_layers, named_tensors, primary_names
from lightning_otrt.layers.pairs import LayerPair


def make():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        AveragedModel,
        checkpoint_wrapper,
        lambda net: torch.compile(AveragedModel(net)),
    ],
    ids=["DataParallel", "compile", "AveragedModel", "checkpoint", "both"],
)
def test_wrappers_are_left_out(wrap):
    inner = make()
    wrapped = wrap(inner)
    assert list(named_layers(wrapped)) == ["", "0", "1"]
    outer = nn.Module()
    outer.net = wrapped
    assert list(named_layers(outer)) == ["", "net", "net.0", "net.1"]
    assert type(named_layers(outer)["net"]) is nn.Sequential
    assert named_tensors(outer)["net.0.bias"] == "Parameter of shape (4,)"


def test_a_child_that_is_called_module_keeps_its_name():
    model = nn.Module()
    model.module = make()
    assert list(named_layers(model)) == ["", "module", "module.0", "module.1"]
    assert child_names(model) == ["module"]


def test_modules_with_two_names():
    model = nn.Module()
    model.net = make()
    model.again = model.net[0]
    modules = named_layers(model)
    assert list(modules) == ["", "net", "net.0", "net.1", "again"]
    assert primary_names(modules, "")[id(model.again)] == "net.0"
    assert primary_names(modules, "again")[id(model.again)] == "again"


def test_missing_children_and_buffers():
    model = nn.BatchNorm1d(3, affine=False)
    model.absent = None
    model.add_module("empty", None)
    assert list(named_layers(model)) == [""]
    assert named_tensors(model) == {
        "running_mean": "buffer of shape (3,)",
        "running_var": "buffer of shape (3,)",
        "num_batches_tracked": "buffer of shape ()",
    }


def test_has_layers():
    assert has_layers(make(), [LayerPair("0", "x"), LayerPair("1:input", "y"), LayerPair("", "z")])
    assert not has_layers(make(), [LayerPair("0", "x"), LayerPair("2", "x")])
