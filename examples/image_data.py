"""Folders of images for the examples: the user's own, or one made from Fashion-MNIST or glyphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.real.checkpoints import normalised
from benchmarks.real.packages import FASHION, fashion_mnist
from examples.glyphs import SCRIPTS, glyphs
from lightning_otrt import FixedViews

#: What ``--data`` names.
IMAGES = "folder with train/<class> and test/<class>, or with one folder for each class"
SIZE = 64
#: Images of each class in the folders that are made here.
COUNTS = {"train": 200, "test": 50}
CLOTHES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def default_folder(parent: Path) -> Path:
    """Writes Fashion-MNIST, or glyphs where its package is not installed, as ``train/<class>/<number>.png``."""
    if FASHION.exists():
        return _write(parent / "fashion-mnist", CLOTHES, {split: fashion_mnist(split) for split in COUNTS})
    print("Fashion-MNIST is not there (`apt-get install dataset-fashion-mnist`), so printed letters stand in for it.")
    drawn = {split: glyphs("lowercase", split, per_class=count).tensors for split, count in COUNTS.items()}
    return _write(
        parent / "letters",
        SCRIPTS["lowercase"],
        {split: ((images[:, 0].clamp(0, 1) * 255).byte(), labels) for split, (images, labels) in drawn.items()},
    )


def image_folder(folder: Path, *, per_class: int, seed: int) -> tuple[Dataset[Any], Dataset[Any], list[str]]:
    """Labelled images for training, all images for the test, and the names of the classes.

    Args:
        folder: Holds ``train`` and ``test`` (or ``val``), each with one folder for each class; or the folders of the
            classes themselves, of which every fourth image is for the test.
        per_class: Training images of each class; 0 takes all.
        seed: Decides which are drawn.

    Raises:
        SystemExit: If the two splits hold other classes.
    """
    augmented = v2.Compose([v2.RandomResizedCrop(SIZE, (0.6, 1.0), (0.9, 1.1)), v2.RandomHorizontalFlip(), _AS_INPUT])
    centred = v2.Compose([v2.Resize(SIZE), v2.CenterCrop(SIZE), _AS_INPUT])
    if (folder / "train").is_dir():
        test_folder = folder / "test" if (folder / "test").is_dir() else folder / "val"
        train, test = ImageFolder(folder / "train", augmented), ImageFolder(test_folder, centred)
        if train.classes != test.classes:
            raise SystemExit(f"{folder / 'train'} holds {train.classes}, but {test_folder} holds {test.classes}.")
        held_out, pool = list(range(len(test))), torch.arange(len(train))
    else:
        train, test = ImageFolder(folder, augmented), ImageFolder(folder, centred)
        order = _by_class(torch.tensor(train.targets))
        held_out, pool = order[3::4].tolist(), torch.cat([order[0::4], order[1::4], order[2::4]])
    drawn = drawn_per_class(torch.tensor(train.targets), pool, per_class, seed)
    # A few fixed views of each image: the teacher has to see each of them only once where its outputs are kept.
    return FixedViews(Subset(train, drawn), views=8), Subset(test, held_out), train.classes


def drawn_per_class(labels: Tensor, pool: Tensor, per_class: int, seed: int) -> list[int]:
    """Indices of at most ``per_class`` samples of each class in the pool; 0 takes all."""
    shuffled = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    if not per_class:
        return shuffled.tolist()
    return torch.cat([shuffled[labels[shuffled] == label][:per_class] for label in labels.unique()]).tolist()


_AS_INPUT = v2.Compose([v2.RGB(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Lambda(normalised)])


def _by_class(labels: Tensor) -> Tensor:
    return labels.argsort(stable=True)


def _write(folder: Path, names: tuple[str, ...] | str, splits: dict[str, tuple[Tensor, Tensor]]) -> Path:
    for split, (images, labels) in splits.items():
        for label, name in enumerate(names):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images[labels == label][: COUNTS[split]]):
                if not (path := place / f"{number}.png").exists():
                    Image.fromarray(image.numpy()).save(path)
    return folder
