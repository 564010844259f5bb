"""The examples with checkpoints: their data, their runs, and whole ones with tiny networks in place of the weights."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from examples import image_data, study, text_data
from examples.image_data import image_folder
from examples.networks import Classifier
from examples.study import Study
from examples.text_data import texts


def make_folder(root: Path, *splits: str) -> Path:
    for split in splits:
        for shade, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for number in range(8):
                Image.new("L", (20, 24), 60 + 120 * shade + number).save(root / split / name / f"{number}.png")
    return root


class Words:
    """Stands for a tokenizer of Hugging Face."""

    def __call__(self, rows: list[str], *, max_length: int, **_: Any) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([[len(row.split())] for row in rows])
        mask = (torch.arange(max_length) < lengths).long()
        return {"input_ids": mask * 7, "attention_mask": mask}

    def __len__(self) -> int:
        return 20


def make_csv(path: Path, **columns: str) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns.values())
        writer.writerows((f"{'word, ' * (number % 5 + 1)}", "ab"[number % 2]) for number in range(24))
    return path


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val"), ("",)])
def test_folders_of_images(splits: tuple[str, ...], tmp_path: Path) -> None:
    train, test, classes = image_folder(make_folder(tmp_path, *splits), per_class=3, seed=0)
    assert classes == ["dark", "light"]
    assert [label for _, label in train] == [0, 0, 0, 1, 1, 1]
    assert len(test) == (16 if len(splits) == 2 else 4)
    assert train[0][0].shape == test[0][0].shape == (3, 64, 64)
    # Without splits, no image is in both.
    seen = {train.dataset.dataset.samples[index] for index in train.dataset.indices}
    assert not seen & {test.dataset.samples[index] for index in test.indices}


def test_splits_with_other_classes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "train", "test")
    (folder / "test" / "light").rename(folder / "test" / "bright")
    with pytest.raises(SystemExit, match="bright"):
        image_folder(folder, per_class=3, seed=0)


def test_what_folders_of_images_may_hold(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "")
    (folder / ".git").mkdir()
    for mode in ("RGBA", "P", "LA", "1"):
        Image.new(mode, (20, 24)).save(folder / "dark" / f"{mode}.png")
    # Sixteen bits a pixel: Pillow would cut all above 255 off.
    Image.fromarray(np.full((20, 24), 30_000, dtype=np.uint16)).save(folder / "dark" / "a.png")
    train, _, classes = image_folder(folder, per_class=0, seed=0)
    assert classes == ["dark", "light"]
    assert all(image.shape == (3, 64, 64) for image, _ in train)
    [place] = [index for index, (path, _) in enumerate(train.dataset.dataset.samples) if path.endswith("a.png")]
    assert (
        abs(float(train.dataset.dataset.loader(train.dataset.dataset.samples[place][0]).getpixel((3, 3))[0]) - 116) < 2
    )


def test_bad_folders_of_images_end_the_program(tmp_path: Path) -> None:
    def read(folder: Path) -> None:
        train, test, _ = image_folder(folder, per_class=0, seed=0)
        assert list(train)
        assert list(test)

    def said(change: Callable[[Path], object], *splits: str) -> str:
        folder = make_folder(tmp_path / str(len(list(tmp_path.iterdir()))), *splits)
        change(folder)
        with pytest.raises(SystemExit) as ended:
            read(folder)
        return str(ended.value)

    assert "light/0.png cannot be read as an image" in said(lambda it: (it / "light/0.png").write_text("no image"), "")
    assert "no valid file for the classes empty" in said(lambda it: (it / "empty").mkdir(), "")
    assert "Too few have 'light' (3)" in said(
        lambda it: [(it / f"light/{number}.png").unlink() for number in range(5)], ""
    )
    assert "at least two classes, and holds ['light']" in said(
        lambda it: shutil.rmtree(it / "train/dark"), "train", "test"
    )
    assert "No such file or directory" in said(lambda it: shutil.rmtree(it / "test"), "train", "test")


def test_a_process_that_loads_data_says_what_is_wrong(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "")
    Image.fromarray(np.zeros((20, 24), dtype=np.float32)).save(folder / "dark" / "a.tiff")
    train, _, _ = image_folder(folder, per_class=0, seed=0)
    with pytest.raises(ValueError, match=r"dark/a.tiff cannot be read as an image \(its pixels are floating-point"):
        list(DataLoader(train, 64, num_workers=1))
    with pytest.raises(SystemExit, match="Expected in"):
        image_folder(folder / "dark" / "0.png", per_class=0, seed=0)


def test_glyphs_stand_in_for_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_data, "FASHION", tmp_path / "nothing")
    monkeypatch.setattr(image_data, "COUNTS", {"train": 2, "test": 1})
    train, test, classes = image_folder(image_data.default_folder(tmp_path), per_class=0, seed=0)
    assert (len(train), len(test), len(classes)) == (52, 26, 26)


def test_texts_of_a_file(tmp_path: Path) -> None:
    train, test, classes = texts(make_csv(tmp_path / "a.csv", t="text", l="label"), Words(), per_class=5, seed=0)
    assert (len(train), len(test), classes) == (10, 6, ["a", "b"])
    ids, mask, label = train[0]
    assert ids.shape == mask.shape == (48,)
    assert label in (0, 1)


def test_a_missing_column(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"'body'.*'text'"):
        texts(make_csv(tmp_path / "a.csv", t="body", l="label"), Words(), per_class=5, seed=0)


def test_rows_that_lack_something_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_csv(tmp_path / "a.csv", first="text", second="label")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"only a text\r\n,a\r\nwords,\r\nmore, b \r\n")
    train, test, classes = texts(path, Words(), per_class=0, seed=0)
    assert classes == ["a", "b"]
    assert len(train) + len(test) == 25
    assert "3 rows without text or label are left out, the first in line 26." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"text,label\nno quotes, so three fields,a\n", "line 2: more fields than columns"),
        (b"text,label\ngr\xfc\xdfe,a\n", "is not in UTF-8"),
        (b"text,label\n", r"at least two classes, and holds \[\]"),
        (b"text,label\n" + b"words,a\n" * 8, r"at least two classes, and holds \['a'\]"),
        (b"text,label\n" + b"words,a\n" * 8 + b"words,b\n", "Too few have 'b' \\(1\\)"),
    ],
)
def test_bad_files_of_texts_end_the_program(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(SystemExit, match=said):
        texts(tmp_path / "a.csv", Words(), per_class=0, seed=0)
    with pytest.raises(SystemExit, match="cannot be read as a CSV file"):
        texts(tmp_path, Words(), per_class=0, seed=0)


def test_a_file_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "debian.csv"
    unwritable = [("text", "label"), ("half of a character: \ud800", "label")]
    with pytest.raises(UnicodeEncodeError):
        text_data._write(path, unwritable)
    assert not path.exists()
    text_data._write(path, [("text", "label")])
    assert [found.name for found in tmp_path.iterdir()] == ["debian.csv"]
    written = path.read_text()
    with pytest.raises(UnicodeEncodeError):
        text_data._write(path, unwritable)
    assert path.read_text() == written


def test_docstrings_stand_in_for_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise FileNotFoundError("No package lists.")

    monkeypatch.setattr(text_data, "descriptions", missing)
    monkeypatch.setattr(text_data, "PARTS_OF_SCIPY", ("integrate", "linalg"))
    path = text_data.default_csv(tmp_path)
    assert text_data.default_csv(tmp_path) == path
    train, test, classes = texts(path, Words(), per_class=20, seed=0)
    assert len(classes) == 2
    assert len(train) == 20 * len(classes) < 2 * len(test)


def test_a_missing_package_ends_with_what_to_install() -> None:
    def load() -> None:
        raise ModuleNotFoundError("`pip install this`")

    with pytest.raises(SystemExit, match="pip install this"):
        study.installed(load)


class Stop(pl.Callback):
    """Stops the program in the third epoch of its first fit, as a user does."""

    epochs: ClassVar[list[int]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append(trainer.current_epoch)
        if self.epochs == [0, 1, 2]:
            raise ZeroDivisionError


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|LeafSpec|exists and is not empty)")
def test_runs_go_on_and_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stop, "epochs", [])
    options = Study(None, tmp_path, per_class=0, seeds=1, steps=5, batch_size=4, workers=0, quick=False)
    data = TensorDataset(torch.randn(8, 3), torch.randint(2, (8,)))

    def compare() -> dict[str, Any]:
        return options.compare(
            tmp_path,
            lambda: Classifier(nn.Linear(3, 2), 2),
            lambda seed: (data, data),
            {"plain": lambda: [Stop()]},
            {"steps": lambda module, test: float(module.trainer.global_step)},
        )

    with pytest.raises(ZeroDivisionError):
        compare()
    assert compare() == {"steps": {"plain": [5.0]}}
    assert Stop.epochs == [0, 1, 2, 2, 3, 4]
    assert compare() == {"steps": {"plain": [5.0]}}
    assert len(Stop.epochs) == 6
    assert len(json.loads((tmp_path / "results.json").read_text())) == 1


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|LeafSpec|exists and is not empty)")
def test_a_run_that_goes_on_has_the_result_of_one_that_was_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TensorDataset(torch.randn(20, 3), torch.randint(2, (20,)))

    def compare(folder: str, epochs: list[int]) -> dict[str, Any]:
        monkeypatch.setattr(Stop, "epochs", epochs)
        (tmp_path / folder).mkdir(exist_ok=True)
        options = Study(None, tmp_path / folder, per_class=0, seeds=1, steps=15, batch_size=4, workers=0, quick=False)
        return options.compare(
            tmp_path,
            lambda: Classifier(nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2)), 2),
            lambda seed: (data, data),
            {"plain": lambda: [Stop()]},
            {"weight": lambda module, test: float(module.net[0].weight.detach().double().sum())},
        )

    straight = compare("straight", [9])
    with pytest.raises(ZeroDivisionError):
        compare("stopped", [])
    assert compare("stopped", [9]) == straight


@pytest.mark.filterwarnings("ignore:.*(does not have many workers|LeafSpec|exists and is not empty)")
def test_folders_of_one_name_are_other_data(tmp_path: Path) -> None:
    def run(place: str, value: float) -> dict[str, Any]:
        options = Study(None, tmp_path, per_class=0, seeds=1, steps=5, batch_size=4, workers=0, quick=False)
        data = TensorDataset(torch.randn(8, 3), torch.randint(2, (8,)))
        return options.compare(
            tmp_path / place / "clean",
            lambda: Classifier(nn.Linear(3, 2), 2),
            lambda seed: (data, data),
            {"plain": list},
            {"value": lambda module, test: value},
        )

    assert run("a", 1.0) == {"value": {"plain": [1.0]}}
    assert run("b", 2.0) == {"value": {"plain": [2.0]}}
    assert run("a", 3.0) == {"value": {"plain": [1.0]}}  # as found before
    # Without the results a run is trained again, and does not go on at its end.
    (tmp_path / "results.json").unlink()
    assert run("a", 3.0) == {"value": {"plain": [3.0]}}
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("option", ["--per-class=-3", "--seeds=0", "--steps=4", "--batch-size=1", "--workers=-1"])
def test_numbers_out_of_range(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["images", "--output", str(tmp_path), option])
    with pytest.raises(SystemExit):
        study.study(None, "images", "a folder", steps=10)
    assert f"{option.replace('=', ' ')}: at least" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["images", "texts", "finetuning"])
def test_whole_examples(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm
    from transformers import BertConfig, BertModel

    from examples import finetuning, images
    from examples import texts as sorting

    def small(num_classes: int = 1000) -> nn.Module:
        return timm.create_model("mobilenetv3_small_050", num_classes=num_classes).eval()

    def encoder() -> tuple[nn.Module, Words]:
        config = BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
        return BertModel(config).eval(), Words()

    monkeypatch.setattr(images, "efficientnet_lite", small)
    monkeypatch.setattr(finetuning, "efficientnet_lite", small)
    monkeypatch.setattr(sorting, "minilm", encoder)
    monkeypatch.setattr(study, "QUICK_STEPS", 5)
    folder = make_folder(tmp_path / "mine", "train", "test")
    data = make_csv(tmp_path / "mine.csv", t="text", l="label") if name == "texts" else folder
    output = tmp_path / "outputs"
    arguments = ["--data", data, "--output", output, "--quick", "--per-class", "6", "--batch-size", "8"]
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    {"images": images, "texts": sorting, "finetuning": finetuning}[name].main()
    assert (output / "figure.png").stat().st_size > 10_000
    assert "plain" in capsys.readouterr().out
