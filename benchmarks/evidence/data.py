"""The data sets of the benchmark, glyphs of several scripts and handwritten digits; choices and claims use other parts.

Students see few labelled images of the train fonts. Choices are made on the validation fonts of a-z, or on training
digits that neither student nor pool holds; claims are made on test fonts and test digits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.digits import digits
from examples.glyphs import glyphs

#: Images per class of the unlabelled pool.
POOL_PER_CLASS = 100
#: Training digits, the same in all runs, that only tune.
_DIGIT_VALIDATION = 300


@dataclass(frozen=True)
class Images:
    """Images (N, 1, H, W), channels last, and labels (N,)."""

    images: Tensor
    labels: Tensor

    @property
    def num_classes(self) -> int:
        """Number of classes, each of which has an image."""
        return int(self.labels.max()) + 1


def labelled(target: str, per_class: int, seed: int) -> Images:
    """The labelled images of a student."""
    if target == "digits":
        images, labels = _digit_parts()["train"]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        chosen = torch.cat([order[labels[order] == digit][:per_class] for digit in range(10)])
        return _pack(images[chosen], labels[chosen])
    return _pack(*glyphs(target, "train", per_class=per_class, seed=seed + 1).tensors)


@functools.lru_cache(maxsize=2)
def pool(target: str) -> Tensor:
    """Unlabelled images for the transfer terms of all methods."""
    if target == "digits":
        return _pack(*_digit_parts()["train"]).images
    # No labelled set draws with this seed: the pool holds other distortions of the same fonts.
    return _pack(*glyphs(target, "train", per_class=POOL_PER_CLASS, seed=99_999).tensors).images


@functools.lru_cache(maxsize=8)
def held_out(target: str, split: str) -> Images:
    """The images of ``"validation"``, to choose by, or ``"test"``, to report."""
    if target == "digits":
        return _pack(*_digit_parts()[split])
    return _pack(*glyphs(target, split).tensors)


@functools.lru_cache(maxsize=4)
def everything(target: str) -> Images:
    """All training images: those of a teacher."""
    if target == "digits":
        return _pack(*_digit_parts()["train"])
    return _pack(*glyphs(target, "train").tensors)


@functools.cache
def _digit_parts() -> dict[str, tuple[Tensor, Tensor]]:
    images, labels = digits("train").tensors
    parts = {"train": slice(_DIGIT_VALIDATION, None), "validation": slice(_DIGIT_VALIDATION)}
    found = {name: (images[part], labels[part]) for name, part in parts.items()}
    test_images, test_labels = digits("test").tensors
    return found | {"test": (test_images, test_labels)}


def _pack(images: Tensor, labels: Tensor) -> Images:
    return Images(images.contiguous(memory_format=torch.channels_last), labels)
