"""Images without a download, so that the YAML files run as they are; put your own LightningDataModule in its place."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms.v2.functional import to_dtype, to_image


class FakeImages(pl.LightningDataModule):
    """Random images with random labels: accuracies mean nothing.

    Args:
        size: Height and width.
        num_classes: Number of classes.
        batch_size: Images in a batch.
        count: Images in an epoch.
    """

    def __init__(self, size: int = 64, num_classes: int = 10, batch_size: int = 16, count: int = 64) -> None:
        super().__init__()
        self.size, self.num_classes, self.batch_size, self.count = size, num_classes, batch_size, count

    def train_dataloader(self) -> DataLoader[Any]:
        """The images."""
        return self._loader(shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The same images."""
        return self._loader(shuffle=False)

    def _loader(self, *, shuffle: bool) -> DataLoader[Any]:
        images = FakeData(self.count, (3, self.size, self.size), self.num_classes, transform=_to_tensor)
        return DataLoader(images, self.batch_size, shuffle=shuffle)


def _to_tensor(image: Any) -> Any:
    import torch

    return to_dtype(to_image(image), torch.float32, scale=True)
