"""Names of modules: wrappers are left out, second names are kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from lightning_otrt.layers.names import (
    child_names,
    has_layers,
    named_layers,
    named_tensors,
    own_parameters,
    primary_names,
)
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


class PeftModel(nn.Module):
    """As that of PEFT holds a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.base_model = net


class Parallel(nn.DataParallel):
    """A wrapper of a user's own."""


def with_prompts(wrapper):
    wrapper.prompts = nn.Embedding(3, 4)
    return wrapper


def with_a_parameter(wrapper):
    wrapper.prompts = nn.Parameter(torch.zeros(3, 4))
    return wrapper


@pytest.mark.parametrize(
    "around", [lambda net: net, nn.DataParallel, torch.compile], ids=["alone", "parallel", "compiled"]
)
@pytest.mark.parametrize(
    "inside", [lambda net: net, nn.DataParallel, torch.compile], ids=["net", "parallel", "compiled"]
)
@pytest.mark.parametrize("kind", [PeftModel, Parallel, AveragedModel])
def test_a_wrapper_with_parameters_of_its_own_has_the_name(kind, inside, around):
    for add, more in ((with_prompts, ["net.prompts"]), (with_a_parameter, [])):
        wrapper = add(kind(inside(make())))
        modules = named_layers(nn.ModuleDict({"net": around(wrapper)}))
        assert set(modules) == {"", "net", "net.0", "net.1", *more}
        assert modules["net"] is wrapper


@pytest.mark.parametrize("kind", [PeftModel, Parallel, AveragedModel])
def test_a_wrapper_that_only_shows_what_it_wraps_has_no_name(kind):
    net = make()
    wrapper = kind(net)
    net = next(wrapper.children())  # an average holds a copy
    wrapper.first, wrapper.weight = net[0], net[0].weight
    modules = named_layers(wrapper)
    assert modules[""] is net
    assert set(modules) == {"", "0", "1", "first"}


def test_own_parameters():
    net = make()
    net.token = nn.Parameter(torch.zeros(4))
    net.more = with_prompts(PeftModel(nn.Linear(4, 2)))
    modules = named_layers(with_a_parameter(PeftModel(nn.DataParallel(net))))
    owners = {id(each): name for name, module in modules.items() for each in own_parameters(module)}
    named = {name: owners[id(each)] for name, each in modules[""].named_parameters()}
    assert named == {
        "prompts": "",
        "base_model.module.token": "",
        "base_model.module.0.weight": "0",
        "base_model.module.0.bias": "0",
        "base_model.module.more.base_model.weight": "more",
        "base_model.module.more.base_model.bias": "more",
        "base_model.module.more.prompts.weight": "more.prompts",
    }


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
