"""Finds what packages ship: images and labels on disk. Each loader says what to install where a package is missing.

- Fashion-MNIST: ``apt-get install dataset-fashion-mnist``
- emoji: ``npm install --prefix outputs/real emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0``
- handwritten digits of MNIST: ``apt-get download opencv-doc && dpkg -x opencv-doc_*.deb outputs/real``
- package descriptions: ``apt-get -o Acquire::Languages=en update``
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FASHION = Path("/usr/share/datasets/fashion-mnist")
EMOJI = Path("outputs/real/node_modules")
DIGITS = Path("outputs/real/usr/share/doc/opencv-doc/examples/data/digits.png")
APT_LISTS = Path("/var/lib/apt/lists")
#: The drawings whose licences allow this use: Noto (Apache-2.0) and Twemoji (CC-BY 4.0).
VENDORS = ("google", "twitter")
#: Type of the entries in an idx file, by its third byte.
_IDX_TYPES = {8: np.dtype("u1")}


@dataclass(frozen=True)
class Emoji:
    """Pictures of emoji.

    Attributes:
        images: ``(n, 3, 64, 64)``, uint8, on white.
        subcategories: Subcategory of each image.
        identities: Number of the emoji, the same for all of its drawings, ``(n,)``.
    """

    images: Tensor
    subcategories: tuple[str, ...]
    identities: Tensor


def fashion_mnist(split: str, root: Path = FASHION) -> tuple[Tensor, Tensor]:
    """Images ``(n, 28, 28)``, uint8, and labels ``(n,)`` of Fashion-MNIST.

    Args:
        split: ``"train"`` or ``"test"``.
        root: Folder of the idx files, compressed or not.

    Raises:
        FileNotFoundError: If the files are not there; it says what to install.
    """
    name = {"train": "train", "test": "t10k"}[split]
    images = read_idx(_find(root, f"{name}-images-idx3-ubyte"))
    labels = read_idx(_find(root, f"{name}-labels-idx1-ubyte"))
    return images, labels.long()


def _find(root: Path, name: str) -> Path:
    for path in (root / name, root / f"{name}.gz"):
        if path.exists():
            return path
    raise FileNotFoundError(f"No {name} in {root}. Install Fashion-MNIST: `apt-get install dataset-fashion-mnist`.")


def read_idx(path: Path) -> Tensor:
    """The array in an idx file (the format of MNIST), compressed by gzip or not.

    Raises:
        ValueError: If it is no idx file of bytes, or has another size than it says.
    """
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        raise ValueError(f"Expected {path} to be an idx file of unsigned bytes, but it begins with {data[:4]!r}.")
    dims = np.frombuffer(data, ">u4", count=data[3], offset=4)
    values = np.frombuffer(data, _IDX_TYPES[data[2]], offset=4 + 4 * len(dims))
    if values.size != dims.prod():
        raise ValueError(f"Expected {path} to hold {dims.prod()} values of shape {tuple(dims)}, but got {values.size}.")
    return torch.from_numpy(values.reshape(dims.tolist()).copy())


def emoji(root: Path = EMOJI) -> Emoji:
    """All emoji in the drawings of :data:`VENDORS`.

    Args:
        root: The folder ``node_modules`` that holds the packages.

    Raises:
        FileNotFoundError: If a package is not there; it says what to install.
        ModuleNotFoundError: If Pillow is not installed.
    """
    from PIL import Image

    images, subcategories, identities = [], [], []
    for vendor in VENDORS:
        package = root / f"emoji-datasource-{vendor}"
        if not (package / "emoji.json").exists():
            raise FileNotFoundError(
                f"No emoji.json in {package}. Install the emoji: `npm install --prefix {root.parent} "
                f"{' '.join(f'emoji-datasource-{name}@16.0.0' for name in VENDORS)}`."
            )
        for number, entry in enumerate(json.loads((package / "emoji.json").read_text())):
            path = package / "img" / vendor / "64" / entry["image"]
            if not (entry[f"has_img_{vendor}"] and path.exists()):
                continue
            picture = Image.open(path).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            pixels = Image.alpha_composite(white, picture).convert("RGB").resize((64, 64))
            images.append(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
            subcategories.append(entry["subcategory"])
            identities.append(number)
    return Emoji(torch.stack(images), tuple(subcategories), torch.tensor(identities))


def digits(path: Path = DIGITS) -> tuple[Tensor, Tensor]:
    """5,000 handwritten digits of MNIST ``(5000, 20, 20)``, uint8, and their labels ``(5000,)``.

    Args:
        path: The picture ``digits.png`` of OpenCV: 50 rows of 100 digits, five rows of each class.

    Raises:
        FileNotFoundError: If it is not there; it says what to install.
        ModuleNotFoundError: If Pillow is not installed.
        ValueError: If the picture has another size.
    """
    from PIL import Image

    if not path.exists():
        raise FileNotFoundError(
            f"No {path.name} in {path.parent}. Unpack it: `apt-get download opencv-doc && dpkg -x opencv-doc_*.deb "
            "outputs/real`."
        )
    pixels = torch.from_numpy(np.array(Image.open(path).convert("L")))
    if pixels.shape != (1000, 2000):
        raise ValueError(f"Expected {path} to have 1000 × 2000 pixels, but got {tuple(pixels.shape)}.")
    images = pixels.view(50, 20, 100, 20).transpose(1, 2).reshape(-1, 20, 20)
    return images, torch.arange(10).repeat_interleave(500)


def descriptions(root: Path = APT_LISTS) -> list[tuple[str, str]]:
    """Section and English description of Debian packages, one for each source package.

    Several binary packages of one source have nearly the same description, so that only the first in the order of
    names is taken: a text of the test set is then not known from training.

    Args:
        root: The folder of apt's lists, compressed in whatever way apt chose.

    Returns:
        ``(section, description)``, the section without its area (``contrib/net`` is ``net``), ordered by package.

    Raises:
        FileNotFoundError: If the lists are not there; it says what to run.
    """
    texts: dict[str, str] = {}
    for path in sorted(root.glob("*_i18n_Translation-en*")):
        for fields in _paragraphs(path):
            texts.setdefault(fields["Package"], fields.get("Description-en", ""))
    found: dict[str, tuple[str, str, str]] = {}
    for path in sorted(root.glob("*_Packages*")):
        for fields in _paragraphs(path):
            package, text = fields["Package"], texts.get(fields["Package"])
            source = fields.get("Source", package).split(" ")[0]
            if text and (source not in found or package < found[source][0]):
                found[source] = package, fields["Section"].rpartition("/")[2], text
    if not found:
        raise FileNotFoundError(
            f"No package lists with English descriptions in {root}. Get them by "
            "`apt-get -o Acquire::Languages=en update` on a Debian system."
        )
    return [(section, text) for _, section, text in sorted(found.values())]


def _paragraphs(path: Path) -> Iterator[Mapping[str, str]]:
    """The paragraphs of a Debian control file; continued lines are joined by spaces."""
    if path.suffix in (".lz4", ".xz", ".gz", ".zst"):
        command = ["/usr/lib/apt/apt-helper", "cat-file", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    else:
        text = path.read_text()
    for paragraph in text.split("\n\n"):
        joined = re.sub(r"\n[ \t]+\.?", " ", paragraph)
        fields = dict(line.partition(": ")[::2] for line in joined.splitlines())
        if "Package" in fields:
            yield {name: re.sub(r"\s+", " ", value).strip() for name, value in fields.items()}
