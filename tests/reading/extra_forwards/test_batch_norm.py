"""Which layers mix the samples of a batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_otrt.reading.extra_forwards.batch_norm import batch_norms_in_training


class OwnNorm(nn.BatchNorm2d):
    """A subclass, as libraries have them."""


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), OwnNorm(4)])
def test_batch_norms(norm):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), norm)
    assert batch_norms_in_training(model) == ["1"]
    assert batch_norms_in_training(model, synchronized=False) == ["1"]
    norm.eval()
    assert batch_norms_in_training(model) == []


def test_synchronized():
    model = nn.Sequential(nn.SyncBatchNorm(4), nn.BatchNorm1d(4))
    assert batch_norms_in_training(model) == ["0", "1"]
    assert batch_norms_in_training(model, synchronized=False) == ["1"]


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4), nn.Identity()])
def test_others(norm):
    assert batch_norms_in_training(norm) == []


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.LayerNorm, nn.InstanceNorm1d])
def test_it_is_what_mixing_means(kind):
    """A layer is named exactly if a sample's output depends on the others."""
    layer = kind(4)
    x = torch.randn(6, 4, 5) if kind is not nn.LayerNorm else torch.randn(6, 4)
    mixes = not torch.allclose(layer(x)[:2], layer(x[:2]), atol=1e-5)
    assert bool(batch_norms_in_training(layer)) == mixes
