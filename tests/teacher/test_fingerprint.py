"""A fingerprint is the same for equal teachers and differs where a weight does."""

from __future__ import annotations

import copy

import torch
from teacher.networks import Lit, Net
from torch import nn

from lightning_otrt.teacher.fingerprint import fingerprint


def test_equal_teachers(net: Net) -> None:
    assert fingerprint(copy.deepcopy(net)) == fingerprint(net)
    assert fingerprint(net.double()) == fingerprint(copy.deepcopy(net).float())


def test_each_parameter_counts(net: Net) -> None:
    seen = {fingerprint(net)}
    for parameter in net.parameters():
        with torch.no_grad():
            parameter.flatten()[0].add_(1)
        seen.add(fingerprint(net))
    assert len(seen) == 1 + len(list(net.parameters()))


def test_the_type_counts() -> None:
    torch.manual_seed(0)
    net = Net()
    torch.manual_seed(0)
    assert fingerprint(Lit().net) == fingerprint(net)
    assert fingerprint(net).startswith("Net-")
    assert fingerprint(nn.Sequential(nn.ReLU())) != fingerprint(nn.ReLU())


def test_parameters_without_values_are_left_out() -> None:
    assert fingerprint(nn.LazyLinear(2)) == "LazyLinear-00000000"
    assert fingerprint(nn.Linear(2, 2, device="meta")) == "Linear-00000000"
