"""The forms of a teacher, through LightningCLI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LAYERS, Net, make_teacher
from packaging.version import Version
from safetensors.torch import save_file

pytest.importorskip("lightning.pytorch.cli")
jsonargparse = pytest.importorskip("jsonargparse")

from trainer.test_cli import run  # noqa: E402

from lightning_otrt import load_teacher  # noqa: E402

needs_causes = pytest.mark.skipif(
    Version(jsonargparse.__version__) < Version("4.53"), reason="older versions name the class, and not why"
)
RESNET = {"block1": "layer1", "block2": "layer2"}


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train"])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Weights of one network in several forms."""
    state = make_teacher().state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "entry.ckpt")
    extra = {"block1.total_ops": torch.zeros(1), "block1.7.num_batches_tracked": torch.tensor(3)}
    save_file({**state, **extra}, tmp_path / "extra.safetensors")
    return tmp_path


def the_teacher(found: Any) -> torch.nn.Module:
    assert found.trainer.global_step == 1
    assert float(found.trainer.callback_metrics["train/otrt"]) > 0
    module: torch.nn.Module = found.trainer.callbacks[0].transfer.teacher.module
    return module


def test_the_arguments_of_load_teacher_can_be_read() -> None:
    """It called itself with its keyword arguments, and jsonargparse followed these calls without an end."""
    parser = jsonargparse.ArgumentParser()
    parser.add_function_arguments(load_teacher, "teacher")
    assert parser.parse_args(["--teacher.source=resnet18"]).teacher.source == "resnet18"


@pytest.mark.parametrize(
    ("name", "form"),
    [("plain.pt", "pair"), ("entry.ckpt", "pair"), ("extra.safetensors", "function")],
)
def test_a_file_with_its_class_as_a_string(files: Path, name: str, form: str) -> None:
    teacher: Any = [str(files / name), "helpers.make_teacher"]
    if form == "function":
        init_args = {"source": teacher[0], "model_class": "helpers.Net"}
        teacher = {"class_path": "lightning_otrt.load_teacher", "init_args": init_args, "dict_kwargs": {"width": 6}}
    loaded = the_teacher(run(files, {"teacher": teacher, "layers": LAYERS}))
    assert isinstance(loaded, Net)
    torch.testing.assert_close(loaded.state_dict(), make_teacher().state_dict())


@pytest.mark.parametrize("teacher", ["resnet18:None", ["resnet18", None], "timm:test_resnet"])
def test_a_name(tmp_path: Path, teacher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if teacher == "timm:test_resnet":
        import timm

        create, asked = timm.create_model, []
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained: asked.append(pretrained) or create(name))
    found = run(tmp_path, {"teacher": teacher, "layers": RESNET}, model={"channels": 3})
    assert type(the_teacher(found)).__name__ == "ResNet"
    assert teacher != "timm:test_resnet" or asked == [True]


@pytest.mark.slow
def test_a_name_with_arguments(tmp_path: Path) -> None:
    teacher = {
        "class_path": "lightning_otrt.load_teacher",
        "init_args": {"source": "timm:test_resnet", "weights": None},
        "dict_kwargs": {"num_classes": 7, "in_chans": 1},
    }
    assert the_teacher(run(tmp_path, {"teacher": teacher, "layers": RESNET})).num_classes == 7


@pytest.mark.parametrize("model_class", [None, "transformers.ResNetForImageClassification"])
def test_a_folder_of_hugging_face(tmp_path: Path, model_class: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"
    )
    folder = str(tmp_path / "teacher")
    saved = transformers.ResNetForImageClassification(config)
    saved.save_pretrained(folder)
    prefix = "" if model_class is None else "resnet."
    layers = {"block1": f"{prefix}encoder.stages.0", "block2": f"{prefix}encoder.stages.1"}
    teacher = folder if model_class is None else [folder, model_class]
    loaded = the_teacher(run(tmp_path, {"teacher": teacher, "layers": layers}))
    assert type(loaded).__name__ == ("ResNetModel" if model_class is None else "ResNetForImageClassification")
    weight = f"{prefix}embedder.embedder.convolution.weight"
    torch.testing.assert_close(loaded.state_dict()[weight], saved.resnet.embedder.embedder.convolution.weight)


@pytest.mark.parametrize(
    ("class_path", "arguments", "words"),
    [
        ("lightning_otrt.load_teacher", {"source": "timm:resnet_18x", "weights": None}, "No timm model is called"),
        ("lightning_otrt.load_teacher", {"source": "none.ckpt", "model_class": "helpers.Net"}, "no checkpoint file"),
        ("lightning_otrt.load_teacher", {"source": "resnet18", "wieght": None}, "wieght"),
        pytest.param("helpers.Ned", {}, "cannot be imported", marks=needs_causes),
        ("helpers.Net", {"widht": 3}, "widht"),
        ("timm.create_model", {"model_name": "resnet_18x"}, "resnet_18x"),
    ],
)
def test_the_error_of_a_class_path(
    tmp_path: Path, class_path: str, arguments: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = {"class_path": class_path, "init_args": arguments}
    with pytest.raises((SystemExit, ValueError, TypeError, ImportError, FileNotFoundError)) as raised:
        run(tmp_path, {"teacher": teacher, "layers": LAYERS})
    shown = f"{raised.value} {capsys.readouterr().err}"
    assert words in shown
    assert "No torchvision model and no file is called" not in shown
