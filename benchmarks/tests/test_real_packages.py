"""Loaders of real data, on tiny files in the layout of the packages."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.real.checkpoints import efficientnet_lite, normalised
from benchmarks.real.packages import VENDORS, descriptions, digits, emoji, fashion_mnist, read_idx


def idx(values: torch.Tensor) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.dim()]) + sizes + values.to(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist(tmp_path: Path, suffix: str) -> None:
    images, labels = torch.randint(256, (5, 28, 28)), torch.arange(5)
    for name, values in (("images-idx3", images), ("labels-idx1", labels)):
        data = idx(values)
        (tmp_path / f"t10k-{name}-ubyte{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    found, found_labels = fashion_mnist("test", tmp_path)
    assert torch.equal(found, images.to(torch.uint8))
    assert torch.equal(found_labels, labels)
    assert found_labels.dtype == torch.int64
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist("train", tmp_path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"PK\3\4", "unsigned bytes"), (bytes([0, 0, 13, 1, 0, 0, 0, 1, 7]), "unsigned bytes")]
    + [(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7]), "to hold 3 values")],
)
def test_files_that_are_no_idx(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        read_idx(path)


def test_emoji(tmp_path: Path) -> None:
    entries = [
        {"image": "a.png", "subcategory": "drink", "has_img_google": True, "has_img_twitter": True},
        {"image": "b.png", "subcategory": "tool", "has_img_google": False, "has_img_twitter": True},
        {"image": "missing.png", "subcategory": "tool", "has_img_google": True, "has_img_twitter": True},
    ]
    for vendor in VENDORS:
        package = tmp_path / f"emoji-datasource-{vendor}"
        folder = package / "img" / vendor / "64"
        folder.mkdir(parents=True)
        (package / "emoji.json").write_text(json.dumps(entries))
        for name in ("a.png", "b.png"):
            Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(folder / name)
    found = emoji(tmp_path)
    assert found.images.shape == (3, 3, 64, 64)
    assert found.subcategories == ("drink", "drink", "tool")
    assert found.identities.tolist() == [0, 0, 1]
    assert int(found.images.min()) == 255  # transparent is white
    with pytest.raises(FileNotFoundError, match="npm install --prefix"):
        emoji(tmp_path / "nowhere")


def test_digits(tmp_path: Path) -> None:
    path = tmp_path / "digits.png"
    with pytest.raises(FileNotFoundError, match="apt-get download opencv-doc"):
        digits(path)
    picture = Image.new("L", (2000, 1000))
    picture.putpixel((20 * 99 + 3, 20 * 5), 200)  # the last digit of the sixth row, which is the first row of ones
    picture.save(path)
    images, labels = digits(path)
    assert images.shape == (5000, 20, 20)
    assert images.nonzero().tolist() == [[599, 0, 3]]
    assert int(labels[599]) == 1
    assert labels.bincount().tolist() == [500] * 10
    Image.new("L", (20, 20)).save(path)
    with pytest.raises(ValueError, match=r"1000 × 2000 pixels, but got \(20, 20\)"):
        digits(path)


def test_descriptions(tmp_path: Path) -> None:
    (tmp_path / "x_main_binary-amd64_Packages").write_text(
        "Package: b-doc\nSource: b (1.0)\nSection: doc\n\n"
        "Package: b-bin\nSource: b\nSection: contrib/net\n\n"
        "Package: alone\nSection: games\n\n"
        "Package: silent\nSection: misc\n"
    )
    (tmp_path / "x_main_i18n_Translation-en").write_text(
        "Package: b-doc\nDescription-md5: 1\nDescription-en: manual of b\n all of it\n\n"
        "Package: b-bin\nDescription-en: program b\n .\n It runs.\n\n"
        "Package: alone\nDescription-en: a  game\n"
    )
    assert descriptions(tmp_path) == [("games", "a game"), ("net", "program b It runs.")]
    with pytest.raises(FileNotFoundError, match="apt-get -o Acquire::Languages=en update"):
        descriptions(tmp_path / "nowhere")


def test_pixels_of_efficientnet_lite() -> None:
    assert torch.allclose(normalised(torch.tensor([0.0, 127 / 255, 1.0])), torch.tensor([-127 / 128, 0.0, 1.0]))


def test_missing_packages_are_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install timm efficientnet-lite9-pytorch-model"):
        efficientnet_lite(9)
