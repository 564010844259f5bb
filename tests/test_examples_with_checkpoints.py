"""The examples with checkpoints: their data, their runs, and whole ones with tiny networks in place of the weights."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

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
