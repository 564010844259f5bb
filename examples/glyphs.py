"""Letters of several scripts, rendered from the fonts that matplotlib ships: no download, a data set in seconds."""

from __future__ import annotations

import functools
import math
import string
from pathlib import Path

import matplotlib
import torch
from matplotlib.ft2font import FT2Font
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

SIZE = 32
CANVAS = 48
SCRIPTS = {
    "source": string.ascii_uppercase + string.digits,
    "lowercase": string.ascii_lowercase,
    "greek": "αβγδεζηθικλμνξοπρστυφχψω",
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "armenian": "".join(map(chr, range(0x561, 0x587))),
    "georgian": "".join(map(chr, range(0x10D0, 0x10F1))),
}
SPLITS = ("train", "validation", "test")
IMAGES_PER_CLASS = {"train": 200, "validation": 50, "test": 50}

# Symbols; some map them to the code points of letters, so that the charmap cannot tell them from text fonts.
_SYMBOL_FONTS = ("LastResort", "cmex", "cmsy", "STIXNonUni", "STIXSiz", "DejaVuSansDisplay", "DejaVuSerifDisplay")


def glyphs(script: str, split: str, *, per_class: int | None = None, seed: int = 0) -> TensorDataset:
    """Draws a data set of distorted, noisy glyphs; no font file is in two splits.

    Args:
        script: A key of `SCRIPTS`; the classes are its characters.
        split: `"train"`, `"validation"` or `"test"`.
        per_class: Number of images of each class, by default `IMAGES_PER_CLASS[split]`.
        seed: Decides fonts, distortions and noise; the same seed gives the same images.

    Returns:
        Images (N, 1, 32, 32) and integer labels (N,).
    """
    per_class = IMAGES_PER_CLASS[split] if per_class is None else per_class
    # The split is part of the seed: else train and test would share their distortions.
    generator = torch.Generator().manual_seed(3 * seed + SPLITS.index(split))
    images, labels = [], []
    for label, variants in enumerate(_rendered(script, split)):
        images.append(variants[torch.randint(len(variants), (per_class,), generator=generator)])
        labels.append(torch.full((per_class,), label))
    return TensorDataset(_distort(torch.cat(images), generator), torch.cat(labels))


def fonts(split: str) -> list[Path]:
    """The text fonts of one split: of every four files in alphabetical order, two train, one validates, one tests."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    text = sorted(path for path in folder.glob("*.ttf") if not path.name.startswith(_SYMBOL_FONTS))
    wanted = {"train": (0, 2), "validation": (1,), "test": (3,)}[split]
    return [path for index, path in enumerate(text) if index % 4 in wanted]


@functools.cache
def _rendered(script: str, split: str) -> list[Tensor]:
    """One tensor (fonts, 1, CANVAS, CANVAS) per character, without distortion."""
    faces = [FT2Font(str(path)) for path in fonts(split)]
    rendered = []
    for character in SCRIPTS[script]:
        covering = [face for face in faces if ord(character) in face.get_charmap()]
        if not covering:
            raise ValueError(f"no {split} font has {character!r} of script {script!r}; choose another script")
        rendered.append(torch.stack([_render(face, character) for face in covering]).unsqueeze(1))
    return rendered


def _render(face: FT2Font, character: str) -> Tensor:
    """One glyph centred on its canvas, at a size that lets the largest letters keep a margin."""
    face.set_size(CANVAS * 0.9, 72)
    face.set_text(character)
    face.draw_glyphs_to_bitmap(antialiased=True)
    bitmap = torch.from_numpy(face.get_image().copy()).float() / 255
    bitmap = bitmap[:, bitmap.any(0)][bitmap.any(1)][:CANVAS, :CANVAS]
    height, width = bitmap.shape
    top, left = (CANVAS - height) // 2, (CANVAS - width) // 2
    return functional.pad(bitmap, (left, CANVAS - width - left, top, CANVAS - height - top))


def _distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotates, scales, shears, shifts, dims and blots each image, down to SIZE x SIZE."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=generator)

    angle, scale, shear = uniform(-20, 20) * math.pi / 180, uniform(0.75, 1.2), uniform(-0.2, 0.2)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    shift_x, shift_y = uniform(-0.12, 0.12), uniform(-0.12, 0.12)
    rows = torch.stack([cos, shear * cos - sin, shift_x, sin, shear * sin + cos, shift_y], dim=1)
    grid = functional.affine_grid(rows.view(count, 2, 3), [count, 1, SIZE, SIZE], align_corners=False)
    ink = functional.grid_sample(images, grid, align_corners=False) * uniform(0.5, 1.0).view(-1, 1, 1, 1)
    blots = functional.interpolate(torch.randn(count, 1, 8, 8, generator=generator), size=SIZE, mode="bilinear")
    return ink + 0.14 * blots + 0.14 * torch.randn(ink.shape, generator=generator)
