"""The handwritten digits of scikit-learn, which come with the library: no download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import TensorDataset

SIZE = 16
TRAIN_IMAGES = 1000


def digits(split: str, *, per_class: int | None = None, seed: int = 0) -> TensorDataset:
    """The digits, of which 1,000 train and 797 test.

    Args:
        split: `"train"` or `"test"`.
        per_class: Keep so many images of each digit; None keeps all.
        seed: Decides the split, and with it the images kept.

    Returns:
        Images (N, 1, 16, 16) with values from 0 to 1 and integer labels (N,).
    """
    loaded = load_digits()
    order = torch.randperm(len(loaded.target), generator=torch.Generator().manual_seed(seed))
    order = order[:TRAIN_IMAGES] if split == "train" else order[TRAIN_IMAGES:]
    labels = torch.from_numpy(loaded.target)[order]
    if per_class is not None:
        kept = torch.cat([torch.nonzero(labels == digit).flatten()[:per_class] for digit in range(10)])
        order, labels = order[kept], labels[kept]
    images = torch.from_numpy(loaded.images).float()[order].unsqueeze(1) / 16
    # Three blocks halve the map three times: from 8 pixels they would leave one.
    return TensorDataset(F.interpolate(images, size=SIZE, mode="bilinear"), labels)
