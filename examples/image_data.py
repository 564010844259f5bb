"""Folders of images for the examples: the user's own, or one made from Fashion-MNIST or glyphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset, get_worker_info
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.real.checkpoints import normalised
from benchmarks.real.packages import FASHION, fashion_mnist
from examples.files import whole
from examples.glyphs import SCRIPTS, glyphs
from lightning_otrt import FixedViews

#: What ``--data`` names.
IMAGES = "folder with train/<class> and test/<class>, or with one folder for each class"
SIZE = 64
#: What the folder of the test may be called, beside ``train``.
TESTS = ("test", "val", "valid", "validation")
#: Every so many samples one is for the test, where there are no folders for it.
EVERY = 4
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
        folder: Holds ``train`` and ``test`` (or ``val``, ``valid``, ``validation``), each with one folder for each
            class; or the folders of the classes themselves, of which every fourth image is for the test.
        per_class: Training images of each class; 0 takes all.
        seed: Decides which are drawn.

    Raises:
        SystemExit: If there are no such folders, a class has too few images, the two splits hold other classes, or an
            image cannot be read.
    """
    augmented = v2.Compose([v2.RandomResizedCrop(SIZE, (0.6, 1.0), (0.9, 1.1)), v2.RandomHorizontalFlip(), _AS_INPUT])
    centred = v2.Compose([v2.Resize(SIZE), v2.CenterCrop(SIZE), _AS_INPUT])
    if (folder / "train").is_dir():
        test_folder = next((folder / name for name in TESTS if (folder / name).is_dir()), folder / TESTS[0])
        train, test = _Images(folder / "train", augmented), _Images(test_folder, centred)
        if train.classes != test.classes:
            raise SystemExit(f"{folder / 'train'} holds {train.classes}, but {test_folder} holds {test.classes}.")
        held_out, pool = list(range(len(test))), torch.arange(len(train))
    else:
        train, test = _Images(folder, augmented), _Images(folder, centred)
        pool, held_out = split(torch.tensor(train.targets), train.classes, folder)
    drawn = drawn_per_class(torch.tensor(train.targets), pool, per_class, seed)
    # A few fixed views of each image: the teacher has to see each of them only once where its outputs are kept.
    return FixedViews(Subset(train, drawn), views=8), Subset(test, held_out), train.classes


def split(labels: Tensor, classes: Sequence[str], source: Path) -> tuple[Tensor, list[int]]:
    """Indices for training and for the test, which gets every fourth sample of each class.

    Raises:
        SystemExit: If there are fewer than two classes, or one of them has too few samples for both.
    """
    if len(classes) < 2:
        raise SystemExit(f"{source} needs samples of at least two classes, and holds {list(classes)}.")
    counts = Counter(labels.tolist())
    if few := [f"{name!r} ({counts[index]})" for index, name in enumerate(classes) if counts[index] < EVERY]:
        raise SystemExit(
            f"{source}: every fourth sample of a class is for the test, so that each class needs at least {EVERY}. Too "
            f"few have {', '.join(few)}."
        )
    order = labels.argsort(stable=True)
    return torch.cat([order[start::EVERY] for start in range(EVERY - 1)]), order[EVERY - 1 :: EVERY].tolist()


def drawn_per_class(labels: Tensor, pool: Tensor, per_class: int, seed: int) -> list[int]:
    """Indices of at most ``per_class`` samples of each class in the pool; 0 takes all."""
    shuffled = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    if not per_class:
        return shuffled.tolist()
    return torch.cat([shuffled[labels[shuffled] == label][:per_class] for label in labels.unique()]).tolist()


_AS_INPUT = v2.Compose([v2.RGB(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Lambda(normalised)])


class _Images(ImageFolder):
    """An ImageFolder without hidden folders, whose errors end the program with what is wrong."""

    def __init__(self, root: Path, transform: v2.Transform) -> None:
        try:
            super().__init__(root, transform, loader=_read)
        except OSError as error:
            raise SystemExit(f"{error}. Expected in {root}: one folder of images for each class.") from None

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The folders of the classes."""
        found = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if len(found) < 2:
            raise SystemExit(f"{directory} needs a folder for each of at least two classes, and holds {found}.")
        return found, {name: index for index, name in enumerate(found)}


def _read(path: str) -> Image.Image:
    """An image in colour; 16 bits a pixel become 8, which Pillow would cut off."""
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise OSError("its pixels are floating-point numbers")
            if not image.mode.startswith("I"):
                return image.convert("RGB")
            values = np.asarray(image)
    except OSError as error:
        message = f"{path} cannot be read as an image ({error}). Repair it, or take it out."
        # A process that loads data passes on errors, but not that the program is to end.
        raise SystemExit(message) if get_worker_info() is None else ValueError(message) from None
    return Image.fromarray((values.clip(0, 65535) // 257).astype("uint8")).convert("RGB")


def _write(folder: Path, names: tuple[str, ...] | str, splits: dict[str, tuple[Tensor, Tensor]]) -> Path:
    for split, (images, labels) in splits.items():
        for label, name in enumerate(names):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number, image in enumerate(images[labels == label][: COUNTS[split]]):
                if not (path := place / f"{number}.png").exists():
                    with whole(path) as part:
                        Image.fromarray(image.numpy()).save(part, "png")
    return folder
