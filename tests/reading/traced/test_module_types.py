"""What types of modules tell; ``test_tracer.py`` has the axes of whole networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_otrt.reading.traced.module_types import axis_of_type, is_elementwise, role_of


class LayerNorm2d(nn.LayerNorm):
    """As in torchvision and timm: channels-first although its base is channels-last."""


class ChannelsFirst(nn.LayerNorm):
    """As in ConvNeXt of Hugging Face."""

    data_format = "channels_first"


@pytest.mark.parametrize(
    ("module", "dims", "axis"),
    [
        (nn.Conv1d(1, 1, 1), 3, 1),
        (nn.ConvTranspose3d(1, 1, 1), 5, 1),
        (nn.SyncBatchNorm(1), 4, 1),
        (nn.GroupNorm(1, 1), 3, 1),
        (nn.AdaptiveMaxPool2d(1), 4, 1),
        (nn.PixelShuffle(2), 4, 1),
        (LayerNorm2d(3), 4, 1),
        (ChannelsFirst(3), 4, 1),
        (nn.Linear(1, 1), 4, 3),
        (nn.LayerNorm(3), 4, 3),
        (nn.LayerNorm((3, 3)), 4, None),
        (nn.RMSNorm(3), 3, 2),
        (nn.Embedding(2, 2), 3, 2),
        (nn.MultiheadAttention(2, 1), 3, 2),
        (nn.TransformerDecoderLayer(2, 1), 3, 2),
        (nn.GRU(2, 2), 3, 2),
        (nn.ReLU(), 4, None),
        (nn.ReLU(), 2, 1),
        (nn.Linear(1, 1), 1, None),
    ],
)
def test_axis_of_type(module, dims, axis):
    assert axis_of_type(module, (2, 3, 4, 5, 6)[:dims]) == axis


class LayerNorm(nn.Module):
    """By hand, of either layout: VITS and Restormer have the channels first, T5 and Llama last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))


class T5RmsNorm(nn.Module):
    """With one parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class CastLayerNorm(nn.LayerNorm):
    """A subclass that may permute before and after."""


class MultiheadAttention(nn.Module):
    """Called as one of PyTorch."""


class Upsample(nn.Module):
    """Of maps in most repositories, of tokens in some."""


@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        (LayerNorm(4), (2, 4, 9), 1),
        (LayerNorm(4), (2, 9, 4), 2),
        (LayerNorm(4), (2, 4, 9, 9), 1),
        (LayerNorm(4), (2, 9, 9, 4), 3),
        (LayerNorm(4), (2, 4, 4), None),
        (LayerNorm(4), (2, 9, 9), None),
        (T5RmsNorm(4), (2, 9, 4), 2),
        (T5RmsNorm(4), (2, 4, 9), 1),
        (CastLayerNorm(4), (2, 9, 4), 2),
        (CastLayerNorm(4), (2, 4, 9), 1),
        (CastLayerNorm(4), (2, 4, 4), 2),
        (MultiheadAttention(), (2, 4, 9), None),
        (Upsample(), (2, 4, 9), None),
        (Upsample(), (2, 4, 9, 9), 1),
        (nn.Upsample(4), (2, 4, 9), 1),
    ],
)
def test_a_type_that_is_only_called_so(module, shape, axis):
    assert axis_of_type(module, shape) == axis


@pytest.mark.parametrize(
    ("module", "role"),
    [
        (nn.Linear(1, 1), "linear"),
        (nn.Conv2d(1, 1, 1), "pointwise"),
        (nn.Conv2d(1, 1, (1, 3)), "conv"),
        (nn.AlphaDropout(), "dropout"),
        (nn.AdaptiveAvgPool1d(1), "pool"),
        (nn.LogSoftmax(1), "passive"),
        (nn.BatchNorm1d(1), ""),
    ],
)
def test_role_of(module, role):
    assert role_of(module) == role


@pytest.mark.parametrize(
    ("module", "expected"), [(nn.GELU(), True), (nn.Dropout2d(), True), (nn.Identity(), True), (nn.Linear(1, 1), False)]
)
def test_is_elementwise(module, expected):
    assert is_elementwise(module) is expected
