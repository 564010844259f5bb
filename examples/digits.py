"""The handwritten digits of scikit-learn, which come with the library: no download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import TensorDataset

SIZE = 16
TRAIN_IMAGES = 1000


def digits(split: str, *, per_class: int | None = None, seed: int = 0) -> TensorDataset:
    """The digits, of which 1,000 train and 797 test.

    Args:
        split: `"train"` or `"test"`; always the same images.
        per_class: Draw so many images of each digit; None keeps all.
        seed: Decides which are drawn.

    Returns:
        Images (N, 1, 16, 16) with values from 0 to 1 and integer labels (N,).
    """
    loaded = load_digits()
    # The file is ordered by writer: without a shuffle, both splits would not hold the same hands.
    order = torch.randperm(len(loaded.target), generator=torch.Generator().manual_seed(0))
    order = order[:TRAIN_IMAGES] if split == "train" else order[TRAIN_IMAGES:]
    labels = torch.from_numpy(loaded.target)[order]
    if per_class is not None:
        drawn = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
        drawn = torch.cat([drawn[labels[drawn] == digit][:per_class] for digit in range(10)])
        order, labels = order[drawn], labels[drawn]
    images = torch.from_numpy(loaded.images).float()[order].unsqueeze(1) / 16
    # Three blocks halve the map three times: from 8 pixels they would leave one.
    return TensorDataset(functional.interpolate(images, size=SIZE, mode="bilinear"), labels)
