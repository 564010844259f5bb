"""Data sets of photographs, read from disk by torchvision's own loaders; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2

#: Mean and standard deviation of ImageNet, which torchvision's weights expect.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Transform = Callable[[Any], Tensor]
Photographs = Dataset[tuple[Tensor, int]]


@dataclass(frozen=True)
class Source:
    """A data set on disk.

    Attributes:
        num_classes: Number of its classes.
        train: From a folder and a transform to the images to train on.
        test: The same for those to test on.
    """

    num_classes: int
    train: Callable[[Path, Transform], Photographs]
    test: Callable[[Path, Transform], Photographs]


def _flowers_train(root: Path, transform: Transform) -> Photographs:
    # As usual for this data set, the validation split trains too.
    return ConcatDataset(datasets.Flowers102(root, split, transform) for split in ("train", "val"))


SOURCES = {
    "cifar100": Source(
        100,
        lambda root, transform: datasets.CIFAR100(root, train=True, transform=transform),
        lambda root, transform: datasets.CIFAR100(root, train=False, transform=transform),
    ),
    "aircraft": Source(
        100,
        lambda root, transform: datasets.FGVCAircraft(root, "trainval", transform=transform),
        lambda root, transform: datasets.FGVCAircraft(root, "test", transform=transform),
    ),
    "cars": Source(
        196,
        lambda root, transform: datasets.StanfordCars(root, "train", transform),
        lambda root, transform: datasets.StanfordCars(root, "test", transform),
    ),
    "flowers": Source(
        102,
        _flowers_train,
        lambda root, transform: datasets.Flowers102(root, "test", transform),
    ),
    "pets": Source(
        37,
        lambda root, transform: datasets.OxfordIIITPet(root, "trainval", transform=transform),
        lambda root, transform: datasets.OxfordIIITPet(root, "test", transform=transform),
    ),
}


def training_transform(size: int = 224) -> Transform:
    """Resize the short side to 256, crop at random, flip (for ``size`` = 224; others in proportion)."""
    return v2.Compose(
        [
            v2.Resize(round(size * 256 / 224)),
            v2.RandomCrop(size),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(_MEAN, _STD),
        ]
    )


def held_out_transform(size: int = 224) -> Transform:
    """Resize the short side to 256 and keep the centre."""
    return v2.Compose(
        [
            v2.Resize(round(size * 256 / 224)),
            v2.CenterCrop(size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(_MEAN, _STD),
        ]
    )


def load(name: str, root: Path, *, split: str, transform: Transform) -> Photographs:
    """A data set that lies in ``root`` as torchvision puts it there.

    Args:
        name: A key of `SOURCES`.
        root: The folder given to torchvision's loader.
        split: ``"train"`` or ``"test"``.
        transform: From a PIL image to a tensor.

    Raises:
        FileNotFoundError: If it is not there; it says what to do.
    """
    source = SOURCES[name]
    try:
        return (source.train if split == "train" else source.test)(root, transform)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"No data set {name!r} in {root}: {error} Put it there as torchvision's loader lays it out; nothing is "
            "downloaded here."
        ) from error


def few(dataset: Photographs, per_class: int, seed: int) -> Photographs:
    """So many images of each class, drawn by a seed, without reading any image.

    Raises:
        ValueError: If a class has fewer.
    """
    labels = torch.tensor(labels_of(dataset))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in labels.unique():
        drawn = order[labels[order] == label][:per_class]
        if len(drawn) < per_class:
            raise ValueError(f"Class {int(label)} has {len(drawn)} images, but {per_class} were asked for.")
        chosen.append(drawn)
    return Subset(dataset, torch.cat(chosen).tolist())


def labels_of(dataset: Any) -> list[int]:
    """The labels, from where torchvision's loaders keep them."""
    if isinstance(dataset, ConcatDataset):
        return [label for part in dataset.datasets for label in labels_of(part)]
    for name in ("targets", "_labels"):
        if hasattr(dataset, name):
            return list(getattr(dataset, name))
    return [label for _, label in dataset._samples]
