"""The labelled samples of each run; test samples are the same in all runs and serve nothing else.

Emoji: two fifths of the emoji of each class are for tests, in both drawings; of the others each seed draws its own for
training, three quarters of them at most, and those that it leaves are for validation. Fashion-MNIST: the first 50,000
training images, the last 10,000 for validation (every seventh), and every third test image. Digits: half of each class
is for tests. Sections: 80 texts of each section are for tests, 50 that follow those of a seed for validation; where a
section has fewer texts than asked for, all others train.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.evidence.runs import Results, Run
from benchmarks.real import packages
from benchmarks.real.checkpoints import minilm, normalised
from benchmarks.real.classes import EMOJI_CLASSES, MORE_SECTIONS, OTHER_EMOJI_CLASSES, SECTIONS
from benchmarks.real.networks import LENGTH

SIZE = 64
#: Fixed views of each training image, random but the first: eight, or fewer where images are many.
VIEWS, SOME_IMAGES = 8, 20_000
_EMOJI_TEST, _EMOJI_TRAIN = 0.4, 0.75
_FASHION_POOL, _FASHION_VALIDATION, _FASHION_TEST = 50_000, 7, 3
_SECTION_TEST, _SECTION_VALIDATION = 80, 50


@dataclass(frozen=True)
class Samples:
    """What a network takes, by the name of the argument, and labels ``(n,)``.

    Attributes:
        inputs: ``{"images": (n, 3, 64, 64)}``, or ``{"input_ids": (n, 48), "attention_mask": (n, 48)}``.
        labels: Classes.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.labels.device

    def to(self, device: str) -> Samples:
        """The same on a device."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return Samples(inputs, self.labels.to(device))

    def batch(self, indices: Tensor) -> Batch:
        """Some of them."""
        return Batch({name: value[indices] for name, value in self.inputs.items()})

    def chunks(self, size: int = 128) -> list[Batch]:
        """All of them, in order."""
        return [self.batch(indices) for indices in torch.split(torch.arange(len(self), device=self.device), size)]


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward: images go by position, since networks name that argument in many ways."""

    inputs: Mapping[str, Tensor]

    def __call__(self, net: Any) -> Tensor:
        """What ``net`` makes of them."""
        if "images" in self.inputs:
            output: Tensor = net(self.inputs["images"])
            return output
        return net(**self.inputs)

    @property
    def mask(self) -> Tensor | None:
        """Which tokens are valid ``(B, T)``; None for images."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.bool()


@dataclass(frozen=True)
class Problem:
    """Training samples, views included, and those that judge."""

    train: Samples
    held_out: Samples

    @property
    def num_classes(self) -> int:
        """Number of classes, each of which has samples."""
        return int(self.train.labels.max()) + 1


def problem_of(run: Run, device: str = "cpu") -> Problem:
    """The samples of a run, on a device."""
    return _problem(run.target, run.per_class, run.seed, run.split, device)


@functools.lru_cache(maxsize=2)
def _problem(target: str, per_class: int, seed: int, split: str, device: str) -> Problem:
    problem = _on_cpu(target, per_class, seed, split)
    return Problem(problem.train.to(device), problem.held_out.to(device))


def _on_cpu(target: str, per_class: int, seed: int, split: str) -> Problem:
    if target in _TEXTS:
        return _sections(_TEXTS[target], per_class, seed, split)
    images, labels, held_out, held_out_labels = _IMAGES[target](per_class, seed, split)
    generator = torch.Generator().manual_seed(seed)
    count = max(1, min(VIEWS, SOME_IMAGES // len(images)))
    views = torch.cat([images, *(random_view(images, generator) for _ in range(count - 1))])
    return Problem(Samples(_pixels(views), labels.repeat(count)), Samples(_pixels(held_out), held_out_labels))


def _pixels(images: Tensor) -> dict[str, Tensor]:
    return {"images": normalised(images).contiguous(memory_format=torch.channels_last)}


def random_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """One random view of each image: moved by up to 7 %, enlarged by up to a quarter, mirrored or not."""
    count = len(images)
    scale = 1 - 0.2 * torch.rand(count, generator=generator)
    mirror = 1 - 2 * (torch.rand(count, generator=generator) < 0.5).float()
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = scale * mirror, scale
    matrix[:, :, 2] = 0.3 * (torch.rand(count, 2, generator=generator) - 0.5)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


Arrays = tuple[Tensor, Tensor, Tensor, Tensor]


def _emoji(classes: Sequence[Sequence[str]], per_class: int, seed: int, split: str) -> Arrays:
    pictures = _emoji_pictures()
    fixed, rng = np.random.default_rng(7), np.random.default_rng(1000 + seed)
    of_subcategory = {name: label for label, names in enumerate(classes) for name in names}
    labels = torch.tensor([of_subcategory.get(_joined(name), -1) for name in pictures.subcategories])
    parts: dict[str, list[Tensor]] = {"train": [], "held out": []}
    for label in range(len(classes)):
        identities = np.unique(pictures.identities[labels == label].numpy())
        fixed.shuffle(identities)
        count = round(_EMOJI_TEST * len(identities))
        test, pool = identities[:count], identities[count:]
        rng.shuffle(pool)
        number = min(per_class, round(_EMOJI_TRAIN * len(pool)))
        chosen = {"train": pool[:number], "held out": test if split == "test" else pool[number:]}
        for part, wanted in chosen.items():
            parts[part].append(torch.isin(pictures.identities, torch.from_numpy(wanted)) & (labels == label))
    train, held_out = (torch.stack(parts[part]).any(0) for part in ("train", "held out"))
    images = pictures.images
    return images[train].float() / 255, labels[train], images[held_out].float() / 255, labels[held_out]


def _joined(subcategory: str) -> str:
    return "face" if subcategory.startswith("face-") else subcategory


@functools.cache
def _emoji_pictures() -> packages.Emoji:
    return packages.emoji()


def _fashion(per_class: int, seed: int, split: str) -> Arrays:
    images, labels = packages.fashion_mnist("train")
    order = torch.from_numpy(np.random.default_rng(1000 + seed).permutation(_FASHION_POOL))
    chosen = torch.cat([order[labels[order] == label][:per_class] for label in range(10)])
    if split == "test":
        held_out, held_out_labels = (part[::_FASHION_TEST] for part in packages.fashion_mnist("test"))
    else:
        held_out, held_out_labels = (part[_FASHION_POOL::_FASHION_VALIDATION] for part in (images, labels))
    return _enlarged(images[chosen]), labels[chosen], _enlarged(held_out), held_out_labels


def _digits(per_class: int, seed: int, split: str) -> Arrays:
    images, labels = packages.digits()
    fixed, rng = np.random.default_rng(7), np.random.default_rng(1000 + seed)
    train: list[int] = []
    held_out: list[int] = []
    for label in range(10):
        numbers = np.flatnonzero(labels.numpy() == label)
        fixed.shuffle(numbers)
        test, pool = np.array_split(numbers, 2)
        rng.shuffle(pool)
        train += pool[:per_class].tolist()
        held_out += (test if split == "test" else pool[per_class:]).tolist()
    return _enlarged(images[train]), labels[train], _enlarged(images[held_out]), labels[held_out]


def _enlarged(images: Tensor) -> Tensor:
    wide = F.interpolate(images[:, None].float() / 255, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return wide.expand(-1, 3, -1, -1)


#: Images and labels for training, then those that are held out, by target.
_IMAGES: dict[str, Callable[[int, int, str], Arrays]] = {
    "emoji": functools.partial(_emoji, EMOJI_CLASSES),
    "other emoji": functools.partial(_emoji, OTHER_EMOJI_CLASSES),
    "fashion": _fashion,
    "digits": _digits,
}
#: Sections by target.
_TEXTS = {"sections": SECTIONS, "24 sections": (*SECTIONS, *MORE_SECTIONS)}


def _sections(sections: Sequence[str], per_class: int, seed: int, split: str) -> Problem:
    rows = _descriptions()
    fixed, rng = np.random.default_rng(7), np.random.default_rng(1000 + seed)
    train: list[int] = []
    held_out: list[int] = []
    for section in sections:
        numbers = np.array([number for number, (name, _) in enumerate(rows) if name == section])
        fixed.shuffle(numbers)
        test, pool = numbers[:_SECTION_TEST], numbers[_SECTION_TEST:]
        rng.shuffle(pool)
        count = min(per_class, len(pool) - _SECTION_VALIDATION)
        train += pool[:count].tolist()
        held_out += (test if split == "test" else pool[count : count + _SECTION_VALIDATION]).tolist()
    return Problem(*(_tokens([rows[number] for number in part], sections) for part in (train, held_out)))


@functools.cache
def _descriptions() -> list[tuple[str, str]]:
    return packages.descriptions()


@functools.cache
def texts_of(target: str) -> str:
    """A short hash of the texts that a target is drawn from, "" for images: other lists of apt give other samples."""
    if target not in _TEXTS:
        return ""
    rows = "\n".join(f"{section} {text}" for section, text in _descriptions() if section in _TEXTS[target])
    return hashlib.sha256(rows.encode()).hexdigest()[:12]


def check_texts(runs: Iterable[Run], results: Results) -> None:
    """Before runs that are missing are added: rows of the same file must be of the same texts, or seeds are not paired.

    Raises:
        ValueError: If rows are of texts that the lists of packages no longer give, or do not say of which.
    """
    for target in sorted({run.target for run in runs if run not in results}):
        known = {row.get("texts", "unknown") for row in results.rows.values() if row["target"] == target}
        if (now := texts_of(target)) and (others := sorted(known - {now})):
            raise ValueError(
                f"Rows in {results.path} are of other texts ({', '.join(others)}) than apt's lists have now ({now}), "
                "so that seeds would not be paired. Give another --folder for new rows."
            )


@functools.cache
def _tokenizer() -> Any:
    return minilm()[1]


def _tokens(rows: list[tuple[str, str]], sections: Sequence[str]) -> Samples:
    texts = [text for _, text in rows]
    found = _tokenizer()(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    labels = torch.tensor([sections.index(section) for section, _ in rows])
    return Samples({"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}, labels)
