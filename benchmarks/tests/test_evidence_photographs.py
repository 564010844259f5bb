"""Real data sets: loaded from tiny images in each one's own layout on disk, and trained on by the real path."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import io
from torchvision import datasets

from benchmarks import photographs
from benchmarks.evidence import real_data

#: Images of each class and split.
EACH = 2
CLASSES = 3


def write_image(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 36), (level, 20, 200)).save(path)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        labels = [label for label in range(CLASSES) for _ in range(EACH)]
        content = {"data": np.zeros((len(labels), 3072), np.uint8), "fine_labels": labels}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a", "b", "c"]}))
    # The loader compares checksums with those of the original files.
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(
        datasets.CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5(folder / "meta")}
    )


def write_aircraft(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    for split, offset in (("trainval", 0), ("test", 100)):
        lines = []
        for index in range(CLASSES * EACH):
            name = f"{offset + index:07d}"
            write_image(folder / "images" / f"{name}.jpg", 80 * (index // EACH))
            lines.append(f"{name} Variant {index // EACH}")
        (folder / f"images_variant_{split}.txt").write_text("\n".join(lines))
    (folder / "variants.txt").write_text("\n".join(f"Variant {label}" for label in range(CLASSES)))


def write_cars(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(["a", "b", "c"], dtype=object)})
    for split, listed in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        entries = np.zeros(CLASSES * EACH, dtype=[("fname", object), ("class", object)])
        for index in range(CLASSES * EACH):
            write_image(folder / f"cars_{split}" / f"{index:05d}.jpg", 80 * (index // EACH))
            # Their classes count from 1.
            entries[index] = (f"{index:05d}.jpg", index // EACH + 1)
        io.savemat(folder / listed, {"annotations": entries})


def write_flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "flowers-102"
    count = 3 * CLASSES * EACH
    for index in range(count):
        write_image(folder / "jpg" / f"image_{index + 1:05d}.jpg", 80 * (index % CLASSES))
    # Their classes and images count from 1.
    io.savemat(folder / "imagelabels.mat", {"labels": np.arange(count) % CLASSES + 1})
    thirds = np.split(np.arange(count) + 1, 3)
    io.savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), thirds, strict=True)))
    files = {
        "image": ("102flowers.tgz", ""),
        "label": ("imagelabels.mat", md5(folder / "imagelabels.mat")),
        "setid": ("setid.mat", md5(folder / "setid.mat")),
    }
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)


def write_pets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, offset in (("trainval", 0), ("test", 100)):
        lines = []
        for index in range(CLASSES * EACH):
            name = f"breed_{'abc'[index // EACH]}_{offset + index}"
            write_image(folder / "images" / f"{name}.jpg", 80 * (index // EACH))
            lines.append(f"{name} {index // EACH + 1} 1 1")
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines))


WRITERS = {
    "cifar100": write_cifar100,
    "aircraft": write_aircraft,
    "cars": write_cars,
    "flowers": write_flowers,
    "pets": write_pets,
}


@pytest.mark.parametrize("name", real_data.SOURCES)
def test_each_data_set_is_read_in_its_own_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS[name](tmp_path, monkeypatch)
    parts = {
        split: real_data.load(name, tmp_path, split=split, transform=transform(size=28))
        for split, transform in (("train", real_data.training_transform), ("test", real_data.held_out_transform))
    }
    assert len(parts["test"]) == CLASSES * EACH
    assert len(parts["train"]) == (2 if name == "flowers" else 1) * CLASSES * EACH
    for dataset in parts.values():
        found = [dataset[index] for index in range(len(dataset))]
        assert {image.shape for image, _ in found} == {(3, 28, 28)}
        assert [label for _, label in found] == real_data.labels_of(dataset)
        assert set(real_data.labels_of(dataset)) == set(range(CLASSES))


@pytest.mark.parametrize("name", real_data.SOURCES)
def test_few_images_of_each_class(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS[name](tmp_path, monkeypatch)
    train = real_data.load(name, tmp_path, split="train", transform=real_data.held_out_transform(28))
    one, same, other = (real_data.few(train, 1, seed) for seed in (0, 0, 1))
    assert [label for _, label in one] == [0, 1, 2]
    assert one.indices == same.indices
    assert len(other) == CLASSES
    with pytest.raises(ValueError, match="were asked for"):
        real_data.few(train, 50, 0)


@pytest.mark.parametrize("name", real_data.SOURCES)
def test_a_missing_data_set_is_told_and_not_downloaded(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing is\\s+downloaded"):
        real_data.load(name, tmp_path, split="train", transform=real_data.held_out_transform())
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_pixels_are_normalised_as_the_weights_expect(tmp_path: Path) -> None:
    write_image(tmp_path / "image.png", 255)
    with Image.open(tmp_path / "image.png") as image:
        found = real_data.held_out_transform(28)(image)
    expected = (torch.tensor([255, 20, 200]) / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(found[:, 14, 14], expected)


def test_heads_are_replaced() -> None:
    for name in ("resnet18", "mobilenet_v2"):
        net = photographs.build(name, 7, pretrained=False)
        assert net.get_submodule(photographs.HEADS[name]).out_features == 7


@pytest.mark.slow
def test_every_method_takes_a_step_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pets(tmp_path, monkeypatch)
    results = tmp_path / "rows.jsonl"
    command = f"--data {tmp_path} --sets pets --teacher resnet18 --student resnet18 --seeds 1 --steps 1 --batch-size 4"
    arguments = [*command.split(), "--size", "64", "--workers", "0", "--no-weights", "--results", f"{results}"]
    photographs.main(arguments)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(rows) == sum(map(len, photographs.DEFINED.values()))
    assert all(0 <= row["accuracy"] <= 100 for row in rows)
    assert f"{tmp_path}" not in results.read_text()
    assert "| pets | 3 | ot-blocks |" in capsys.readouterr().out
    before = results.read_text()
    photographs.main(arguments)
    assert results.read_text() == before
