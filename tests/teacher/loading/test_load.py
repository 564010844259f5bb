"""What is accepted as a teacher: modules, names of torchvision and checkpoints, and the errors of all else."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import lightning
import pytest
import pytorch_lightning
import timm
import torch
from safetensors.torch import save_file
from teacher.networks import Lit, Net, digest, modes
from torch import Tensor

from lightning_otrt.teacher.frozen.frozen_teacher import Teacher
from lightning_otrt.teacher.loading.load import load_teacher


class TestModule:
    @pytest.mark.parametrize("make", [Net, Lit])
    def test_a_module_is_returned_as_it_is(self, make: Any) -> None:
        module = make()
        before = modes(module)
        assert load_teacher(module) is module
        assert modes(module) == before

    def test_a_module_of_the_other_lightning_package_is_a_module(self) -> None:
        class Other(pytorch_lightning.LightningModule):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * x

        module = load_teacher(Other())
        assert Teacher(module)(torch.ones(1)) == 2

    @pytest.mark.parametrize(
        "extra", [{"model_class": Net}, {"width": 3}, {"weights": "IMAGENET1K_V1"}, {"weights": None}]
    )
    def test_arguments_that_a_module_has_no_use_for(self, extra: dict[str, Any]) -> None:
        with pytest.raises(
            TypeError, match=rf"^\['{next(iter(extra))}'\] would have no effect on the teacher Net; leave"
        ):
            load_teacher(Net(), **extra)

    @pytest.mark.parametrize("source", [3, None, torch.relu, ("a", "b", "c"), [Net(), None], b"resnet18"])
    def test_other_objects(self, source: Any) -> None:
        with pytest.raises(
            TypeError, match=r"Expected `teacher` to be an nn\.Module \(a LightningModule is one\), the na"
        ):
            load_teacher(source)

    def test_a_class_and_an_object_of_the_other_package(self) -> None:
        with pytest.raises(TypeError, match=r"but got the class Net \(pass an instance\)\.$"):
            load_teacher(Net)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"of type pytorch_lightning\.core\.datamodule\.LightningDataModule\.$"):
            load_teacher(pytorch_lightning.LightningDataModule())


class TestTorchvision:
    @pytest.mark.parametrize(
        "source", ["resnet18", "ResNet18", "resnet18:None", ("resnet18", None), ["resnet18", None]]
    )
    def test_untrained(self, source: Any) -> None:
        weights = {"weights": None} if isinstance(source, str) and ":" not in source else {}
        model = load_teacher(source, num_classes=7, **weights)
        assert type(model).__name__ == "ResNet"
        assert model.fc.out_features == 7

    @pytest.mark.parametrize(
        ("source", "options", "expected"),
        [
            ("resnet50", {}, "DEFAULT"),
            ("resnet50", {"weights": "IMAGENET1K_V2"}, "IMAGENET1K_V2"),
            ("resnet50:IMAGENET1K_V2", {}, "IMAGENET1K_V2"),
            (("resnet50", "ResNet50_Weights.IMAGENET1K_V1"), {}, "ResNet50_Weights.IMAGENET1K_V1"),
        ],
    )
    def test_weights(self, source: Any, options: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision import models

        asked = []
        monkeypatch.setattr(models, "get_model", lambda name, weights: asked.append((name, weights)) or Net())
        load_teacher(source, **options)
        assert asked == [("resnet50", expected)]

    def test_no_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*args: Any, **kwargs: Any) -> Any:
            raise URLError("no route to host")

        monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fails)
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fails)
        with pytest.raises(RuntimeError, match=r"'resnet18' could not be downloaded \(no route to host\)"):
            load_teacher("resnet18")

    def test_enum(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision import models

        asked = []
        monkeypatch.setattr(models, "get_model", lambda name, weights: asked.append(weights) or Net())
        load_teacher("resnet18", weights=models.ResNet18_Weights.IMAGENET1K_V1)
        load_teacher(("resnet18", models.ResNet18_Weights.IMAGENET1K_V1))
        assert asked == [models.ResNet18_Weights.IMAGENET1K_V1] * 2

    def test_unknown_name(self) -> None:
        expected = "No torchvision model and no file is called 'resnet5'. Did you mean 'resnet50' or "
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}"):
            load_teacher("resnet5")
        with pytest.raises(ValueError, match=r"is called 'microsoft/%%'\. A teacher is an nn\.Module"):
            load_teacher("microsoft/%%")

    @pytest.mark.parametrize("source", ["resnet50:IMAGENET21K", ("resnet50", "IMAGENET21K")])
    def test_unknown_weights(self, source: Any) -> None:
        expected = (
            "'resnet50' has no weights 'IMAGENET21K'. Choose from ['IMAGENET1K_V1', 'IMAGENET1K_V2', 'DEFAULT'], or "
            "None for an untrained network."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            load_teacher(source)

    def test_arguments_without_effect(self) -> None:
        with pytest.raises(TypeError, match=r"^\['weights'\] would have no effect on the teacher 'resnet18:DEFAULT';"):
            load_teacher("resnet18:DEFAULT", weights="IMAGENET1K_V1")
        with pytest.raises(TypeError, match=r"^\['model_class'\] would have no effect on the teacher 'resnet18';"):
            load_teacher("resnet18", model_class=Net)

    def test_without_torchvision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torchvision", None)
        with pytest.raises(
            ImportError, match=r"^The teacher 'resnet18' needs torchvision: `pip install torchvision`\.$"
        ):
            load_teacher("resnet18")


class TestTimm:
    def test_pretrained_or_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append((name, options)) or Net())
        load_teacher("timm:test_vit")
        load_teacher(("timm:test_vit", None), num_classes=3)
        assert asked == [
            ("test_vit", {"pretrained": True}),
            ("test_vit", {"pretrained": False, "num_classes": 3}),
        ]

    def test_no_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*args: Any, **options: Any) -> Any:
            raise ConnectionError("no route")

        monkeypatch.setattr(timm, "create_model", fails)
        with pytest.raises(RuntimeError, match=r"be downloaded \(ConnectionError: no route\).*\('timm:test_vit', None"):
            load_teacher("timm:test_vit")

    def test_errors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"^No timm model is called 'resnet5'\. Did you mean 'resnet50'"):
            load_teacher("timm:resnet5")
        with pytest.raises(TypeError, match=r"^\['weights'\] would have no effect on the teacher 'timm:test_vit'"):
            load_teacher("timm:test_vit", weights="IMAGENET1K_V1")
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(ImportError, match=r"^The teacher 'timm:test_vit' needs timm: `pip install timm`\.$"):
            load_teacher("timm:test_vit")


class TestFolder:
    def test_class_without_from_pretrained(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(TypeError, match="expected a `model_class` with `from_pretrained`, but got 'Net'"):
            load_teacher(tmp_path, model_class=Net)

    def test_without_transformers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "config.json").write_text("{}")
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match="needs transformers: `pip install transformers`"):
            load_teacher(str(tmp_path))


class TestCheckpoint:
    @pytest.mark.parametrize("wrapped", [True, False])
    @pytest.mark.parametrize("form", [str, Path])
    def test_state_dict(self, wrapped: bool, form: Any, tmp_path: Path) -> None:
        path = tmp_path / "teacher.pt"
        saved = Net(5)
        torch.save({"state_dict": saved.state_dict(), "epoch": 3} if wrapped else saved.state_dict(), path)
        assert digest(load_teacher(form(path), model_class=Net, width=5)) == digest(saved)
        assert digest(load_teacher((form(path), lambda: Net(5)))) == digest(saved)

    @pytest.mark.parametrize("wrapped", [True, False])
    def test_weights_alone_of_a_lightning_module(self, wrapped: bool, tmp_path: Path) -> None:
        path, saved = tmp_path / "teacher.pt", Lit(width=6)
        torch.save({"state_dict": saved.state_dict()} if wrapped else saved.state_dict(), path)
        assert digest(load_teacher(path, model_class=Lit, width=6)) == digest(saved)
        with pytest.raises(ValueError, match="do not fit Lit"):
            load_teacher(path, model_class=Lit, width=7)

    def test_class_by_its_import_path(self, tmp_path: Path) -> None:
        path = tmp_path / "teacher.pt"
        torch.save(Net().state_dict(), path)
        assert isinstance(load_teacher(path, model_class="teacher.networks.Net"), Net)
        for wrong in ("teacher.networks.Ned", "no_such_package.Net", "Net"):
            with pytest.raises(ImportError, match=f"'my_package.models.MyModule', but '{wrong}' cannot be imported: "):
                load_teacher((path, wrong))

    def test_safetensors(self, tmp_path: Path) -> None:
        saved, path = Net(), tmp_path / "teacher.safetensors"
        harmless = {"embeddings.position_ids": torch.arange(4), "head.total_params": torch.zeros(1)}
        save_file({**saved.state_dict(), **harmless}, path)
        assert digest(load_teacher(path, model_class=Net)) == digest(saved)
        save_file({**saved.state_dict(), "more.weight": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match=r"do not fit Net\. Missing: none\. Unexpected: 'more\.weight'\.$"):
            load_teacher(path, model_class=Net)
        path.write_bytes(b"not a file of tensors")
        with pytest.raises(RuntimeError, match="could not be read"):
            load_teacher(path, model_class=Net)

    def test_any_existing_file(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.bin"
        torch.save(Net().state_dict(), path)
        assert isinstance(load_teacher(str(path), model_class=Net), Net)

    def test_lightning_checkpoint(self, tmp_path: Path) -> None:
        path = tmp_path / "teacher.ckpt"
        trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=0)
        task = Lit(width=6)
        trainer.strategy.connect(task)
        trainer.save_checkpoint(path, weights_only=True)
        loaded = load_teacher(path, model_class=Lit)
        assert loaded.hparams["width"] == 6
        assert digest(loaded) == digest(task)
        with pytest.raises(
            ValueError, match=r"The names in the file begin with 'net\.': pass the class that holds this"
        ):
            load_teacher(path, model_class=Net, width=6)

    def test_no_class(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        torch.save(Net(), "a.ckpt")
        expected = (
            "Of the checkpoint 'a.ckpt' only the weights are read: expected the class of the network as `model_class`, "
            "but got None. Pass load_teacher('a.ckpt', model_class=MyModule), or ('a.ckpt', MyModule) as the teacher. "
            "If the file holds the whole network, as of torch.save(network, path), and you trust it, pass "
            "torch.load('a.ckpt', weights_only=False)."
        )
        with pytest.raises(TypeError, match=f"^{re.escape(expected)}$"):
            load_teacher("a.ckpt")
        with pytest.raises(TypeError, match=r"as `model_class`, but got Net\."):
            load_teacher(("a.ckpt", Net()))

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"^There is no checkpoint file '.*/a\.pth' to load the teacher from\.$"
        ):
            load_teacher(tmp_path / "a.pth", model_class=Net)
        with pytest.raises(FileNotFoundError, match="^There is no checkpoint file"):
            load_teacher("a.pth")

    def test_keys_that_do_not_fit(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        torch.save({f"other{i}": torch.ones(1) for i in range(7)}, path)
        expected = (
            f"The weights in {str(path)!r} do not fit Net. Missing: 'body.0.weight', 'body.0.bias', 'body.1.weight', "
            "'body.1.bias', 'body.1.running_mean' and 3 more. Unexpected: 'other0', 'other1', 'other2', 'other3', "
            "'other4' and 2 more."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            load_teacher(path, model_class=Net)

    def test_shapes_that_do_not_fit(self, tmp_path: Path) -> None:
        torch.save(Net(5).state_dict(), tmp_path / "a.pt")
        with pytest.raises(
            ValueError, match=r"a\.pt' do not fit Net: Error\(s\) in loading[\s\S]*size mismatch for body\.0"
        ):
            load_teacher(tmp_path / "a.pt", model_class=Net)

    def test_no_state_dict(self, tmp_path: Path) -> None:
        torch.save(torch.ones(2), tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"expected a state dict, alone or as 'state_dict', but got Tensor\.$"):
            load_teacher(tmp_path / "a.pt", model_class=Net)

    @pytest.mark.parametrize("model_class", [Net, Lit])
    def test_a_pickled_module_is_refused(self, model_class: Any, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        torch.save(Net(), path)
        expected = f"The checkpoint {str(path)!r} could not be read (Unsupported global: GLOBAL "
        with pytest.raises(RuntimeError, match=f"^{re.escape(expected)}.*If you trust the file, load the teacher with"):
            load_teacher(path, model_class=model_class)

    def test_a_class_with_arguments(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        torch.save(torch.nn.Linear(3, 2).state_dict(), path)
        with pytest.raises(TypeError, match=r"could not be built by Linear: .*missing 2 required .* Pass them, as in"):
            load_teacher(path, model_class=torch.nn.Linear)
        module = load_teacher(path, model_class=torch.nn.Linear, in_features=3, out_features=2)
        assert isinstance(module, torch.nn.Linear)

    @pytest.mark.parametrize("content", [b"", b"hello", b"junk"])
    def test_a_damaged_file(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(RuntimeError, match=r"read \((EOFError|KeyError|error)\(.*\)\. Either it is damaged or of"):
            load_teacher(tmp_path / "a.pt", model_class=Net)


def test_a_folder_without_some_weights_of_the_class(tmp_path: Path) -> None:
    """A new head would be distilled, and a new pooler makes another teacher of each run."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    saved = transformers.BertModel(transformers.BertConfig(vocab_size=11, **sizes))
    saved.save_pretrained(folder := str(tmp_path))
    loaded = load_teacher(folder)
    assert all(map(torch.equal, loaded.state_dict().values(), saved.state_dict().values()))
    kind = transformers.BertForSequenceClassification
    with pytest.warns(UserWarning, match=r"no weights of the teacher BertForSequenceClassification.*'classifier.bias'"):
        assert isinstance(load_teacher((folder, kind)), kind)
    own = type("OwnHead", (kind,), {})
    with pytest.warns(UserWarning, match="no weights of the teacher OwnHead"):
        load_teacher((folder, own))
    without = load_teacher(folder, model_class=transformers.BertModel, add_pooling_layer=False)
    assert without.pooler is None
