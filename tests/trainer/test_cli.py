"""The callback from YAML: each form of its arguments parses and trains a step."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from helpers import Task, differ, hooks, loader, weights
from torch.utils.data import DataLoader

from lightning_otrt import (
    LayerPair,
    LinearWarmup,
    LogitDistillation,
    OTRTCallback,
    OTRTModule,
    RepresentationTransfer,
)

cli = pytest.importorskip("lightning.pytorch.cli")
pytest.importorskip("jsonargparse")

NET = {"class_path": "helpers.Net", "init_args": {"width": 6}}


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train"])


class FromYaml(Task):
    """A task that a command line can build, with data of its own."""

    def __init__(self, width: int = 4, channels: int = 1) -> None:
        super().__init__(width)
        self.channels = channels
        if channels > 1:
            self.net.block1[0] = torch.nn.Conv2d(channels, width, 3, padding=1)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(16)

    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return super().loss([batch[0].expand(-1, self.channels, -1, -1), batch[1]])


def run(
    tmp_path: Path,
    init_args: dict[str, Any],
    *arguments: str,
    model: dict[str, Any] | None = None,
    wrapper: dict[str, Any] | None = None,
) -> Any:
    """A step with the callback; or with the wrapper, around the model."""
    callbacks = [{"class_path": "lightning_otrt.OTRTCallback", "init_args": init_args}]
    config = {
        "seed_everything": 1,
        "model": {"class_path": f"{__name__}.FromYaml", "init_args": model or {}}
        if wrapper is None
        else {"class_path": "lightning_otrt.OTRTModule", "init_args": {"task": model, **wrapper}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "callbacks": callbacks if wrapper is None else [],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return cli.LightningCLI(
        args=["fit", f"--config={path}", *arguments], save_config_callback=None, subclass_mode_model=True
    )


TORCHVISION = {"class_path": "torchvision.models.resnet18", "init_args": {"weights": None, "num_classes": 4}}
CASES: dict[str, dict[str, Any]] = {
    "a teacher by its class": {"teacher": NET},
    "a function of torchvision": {"teacher": TORCHVISION, "layers": {"net.block1": "layer1"}},
    "a word": {"teacher": NET, "layers": "penultimate"},
    "an index": {"teacher": NET, "layers": -2},
    "a mapping": {"teacher": NET, "layers": {"net.block1": "block1", "net.block2": "block2"}},
    "names": {"teacher": NET, "layers": ["block1", "block2"], "student_root": "net"},
    "pairs of names": {"teacher": NET, "layers": [["net.block1", "block1"], ["net.block2", "block2"]]},
    "layer pairs": {
        "teacher": NET,
        "layers": [
            {"student": "net.block1", "teacher": "block1", "weight": 3.0},
            {"student": "net.block2", "teacher": "block2", "neuron_axis": [1, 1]},
        ],
    },
    "words together": {"teacher": NET, "layers": ["blocks", "penultimate"]},
    "a schedule by its class": {
        "teacher": NET,
        "schedule": {"class_path": "lightning_otrt.LinearWarmup", "init_args": {"steps": 4}},
    },
    "distillation by its weight": {"teacher": NET, "distillation": 0.5},
    "distillation in full": {"teacher": NET, "distillation": {"weight": 0.5, "temperature": 2.0}},
    "distillation by its class": {
        "teacher": NET,
        "distillation": {
            "class_path": "lightning_otrt.LogitDistillation",
            "init_args": {"weight": 0.5, "select": ["logits", 0]},
        },
    },
    "a teacher in half precision": {"teacher": NET, "teacher_dtype": "bfloat16"},
    "a cache in memory": {"teacher": NET, "teacher_cache": "memory"},
    "a cache with settings": {"teacher": NET, "teacher_cache": {"limit": "2MB", "dtype": "bfloat16"}},
    "a cache by its class": {
        "teacher": NET,
        "teacher_cache": {"class_path": "lightning_otrt.TeacherCache", "init_args": {"limit": "2MB"}},
    },
    "everything": {
        "teacher": NET,
        "layers": "auto",
        "weight": 0.5,
        "student_root": "net",
        "cost": "euclidean",
        "plan": "exact",
        "epsilon": 0.02,
        "memory": 0.9,
        "solve_every": 2,
        "grid": 2,
        "schedule": None,
        "distillation": 1,
        "teacher_inputs": f"{__name__}.same",
        "teacher_dtype": None,
        "teacher_cache": "1GB",
        "global_batch": None,
        "strict": False,
        "seed": 3,
    },
}


def same(x: torch.Tensor) -> torch.Tensor:
    """An adapter by its path."""
    return x


@pytest.mark.parametrize("name", CASES)
def test_from_yaml(tmp_path, name):
    options = CASES[name]
    of_torchvision = "resnet18" in str(options["teacher"])
    found = run(tmp_path, options, model={"channels": 3} if of_torchvision else {})
    (callback,) = [c for c in found.trainer.callbacks if isinstance(c, OTRTCallback)]
    assert found.trainer.global_step == 1
    assert callback.transfer.engine.calls == 1
    assert float(found.trainer.callback_metrics["train/otrt"]) > 0
    assert not hooks(found.model)
    expected = {
        "a mapping": ["net.block1", "net.block2"],
        "names": ["net.block1", "net.block2"],
        "pairs of names": ["net.block1", "net.block2"],
        "layer pairs": ["net.block1", "net.block2"],
    }
    if name in expected:
        assert [pair.student for pair in callback.transfer.pairs] == expected[name]
    if name == "layer pairs":
        assert callback.transfer.pairs[0] == LayerPair("net.block1", "block1", 0.75, (1, 1))
    if name.startswith("distillation"):
        assert float(found.trainer.callback_metrics["train/distillation"]) > 0
    if name == "distillation in full":
        assert callback.distillation == LogitDistillation(0.5, temperature=2.0)
    if name == "distillation by its class":
        assert callback.distillation == LogitDistillation(0.5, select=("logits", 0))
    if name == "a schedule by its class":
        assert callback.transfer.schedule == LinearWarmup(4)
        assert found.trainer.callback_metrics["otrt/weight"] == 8.0
    if name == "a teacher in half precision":
        assert callback.transfer.teacher.module.head.weight.dtype in (torch.float32, torch.bfloat16)
        assert callback.transfer.teacher.dtype == torch.bfloat16
    if name.startswith("a cache"):
        expected = {"a cache in memory": None}.get(name, "2MB")
        assert callback.transfer.cache.options.limit == expected
        callback.transfer.cache.flush()
        assert callback.transfer.cache.store.samples == 8
    if name == "everything":
        transfer = callback.transfer
        given = {key: options[key] for key in ("weight", "plan", "epsilon", "memory", "solve_every", "grid", "seed")}
        assert {key: getattr(transfer, key) for key in given} == given
        assert transfer.teacher._inputs is same


RIGHT = [CASES["a cache with settings"]["teacher_cache"], CASES["a cache by its class"]["teacher_cache"]]


@pytest.mark.parametrize(
    "given",
    [
        *RIGHT,
        {"limt": "2MB"},
        {"limit": "much"},
        {"limit": "2MB", "dtype": "float16"},
        {"class_path": "lightning_otrt.TeacherCache", "init_args": {"limt": "2MB"}},
        {"class_path": "lightning_otrt.LinearWarmup", "init_args": {"steps": 2}},
        {"folder": {"limit": "2MB"}},
        ["2MB"],
        True,
    ],
    ids=str,
)
def test_a_cache_leaves_no_folder_by_mistake(tmp_path, monkeypatch, given):
    """What is no TeacherCache is an error, never a folder that is named after it."""
    monkeypatch.chdir(tmp_path)
    is_right = given in RIGHT
    try:
        run(tmp_path, {"teacher": NET, "teacher_cache": given})
    except (SystemExit, TypeError, ValueError):
        assert not is_right
    else:
        assert is_right
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_cache_in_a_folder(tmp_path):
    options = {"teacher": NET, "teacher_cache": str(tmp_path / "kept")}
    first = run(tmp_path, options, "--trainer.callbacks.init_args.layers=blocks")
    again = run(tmp_path, options, "--trainer.callbacks.init_args.layers=blocks")
    assert [each.trainer.callbacks[0].transfer.cache.hits for each in (first, again)] == [0, 8]


def test_arguments_on_the_command_line(tmp_path):
    found = run(
        tmp_path,
        {"teacher": NET, "layers": "penultimate"},
        "--trainer.callbacks.init_args.weight=0.25",
        "--trainer.callbacks.init_args.plan=exact",
    )
    assert found.trainer.callback_metrics["otrt/weight"] == 0.25
    assert found.trainer.callbacks[0].transfer.plan == "exact"


def test_the_yaml_trains_as_python_does(tmp_path):
    found = run(tmp_path, {"teacher": NET, "layers": "auto", "weight": 0.0})
    plain = FromYaml()
    plain.load_state_dict(found.model.state_dict())
    assert not differ(weights(plain), weights(found.model))
    with_term = run(tmp_path, {"teacher": NET, "layers": "auto"})
    assert differ(weights(with_term.model), weights(found.model))


def test_a_saved_configuration_can_be_run_again(tmp_path):
    """What LightningCLI writes beside a run is what it reads."""
    first = run(tmp_path, CASES["layer pairs"])
    written = first.parser.dump(first.config, skip_none=False)
    (tmp_path / "again.yaml").write_text(written)
    config = yaml.safe_load(written)["fit"]
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    again = cli.LightningCLI(
        args=["fit", f"--config={tmp_path / 'again.yaml'}"], save_config_callback=None, subclass_mode_model=True
    )
    assert again.trainer.callbacks[0].transfer.pairs == first.trainer.callbacks[0].transfer.pairs
    assert not differ(weights(again.model), weights(first.model))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weigth": 1.0}, "weigth"),
        ({"plan": "sinkhron"}, "sinkhron"),
        ({"layers": ["block7"]}, "block7"),
        ({"teacher_cache": {"limt": "2MB"}}, "limt"),
    ],
)
def test_a_misspelt_configuration_is_named(tmp_path, capsys, change, words):
    with pytest.raises((SystemExit, ValueError)) as error:
        run(tmp_path, {"teacher": NET, **change})
    assert words in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize("change", [{"process_group": None}, {"weight": "much"}, {"memory": 2}])
def test_what_no_configuration_can_have(tmp_path, capsys, change):
    with pytest.raises((SystemExit, ValueError)) as error:
        run(tmp_path, {"teacher": NET, **change})
    assert next(iter(change)) in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize(("what", "own"), [("trainer.callbacks", []), ("model", ["task"])])
def test_help_shows_each_option(capsys, what, own):
    """With its default and its description, as the class that has them says."""
    name = {"trainer.callbacks": "OTRTCallback", "model": "OTRTModule"}[what]
    with pytest.raises(SystemExit):
        cli.LightningCLI(
            pl.LightningModule,
            args=["fit", f"--{what}.help=lightning_otrt.{name}"],
            subclass_mode_model=True,
        )
    text = " ".join(capsys.readouterr().out.split()).partition(" Help for ")[2]  # after the short list of options
    text = re.sub(r"(--\S+)(?: (\w+))?, \1\+ (\w+)", r"\1 \3", text)  # how a list is extended, from Python 3.13 shorter
    for option, parameter in inspect.signature(RepresentationTransfer).parameters.items():
        if option == "process_group":
            assert option not in text
            continue
        _, _, shown = text.partition(f" --{what}.{option} ")
        assert shown, option
        first_words = re.search(rf"\n    {option}: (.{{20}})", inspect.getdoc(RepresentationTransfer))[1]
        assert first_words in shown.split(f" --{what}.")[0], option
        if parameter.default not in (parameter.empty, None):
            assert f"default: {parameter.default}" in shown, option
    assert all(f" --{what}.{option} " in text for option in own)


def test_the_wrapper_from_yaml(tmp_path):
    task = {"class_path": f"{__name__}.FromYaml", "init_args": {"width": 5}}
    found = run(tmp_path, {}, model=task, wrapper={"teacher": NET, "layers": {"net.block1": "block1"}, "weight": 2.0})
    wrapped = found.model
    assert isinstance(wrapped, OTRTModule)
    assert isinstance(wrapped, FromYaml)
    assert repr(wrapped.otrt) == "RepresentationTransfer(Net(...), {'net.block1': 'block1'}, weight=2.0)"
    assert float(found.trainer.callback_metrics["train/otrt"]) > 0
    # LightningCLI saves the configuration of the model, which is that of the wrapper.
    found.trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = OTRTModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert isinstance(loaded, FromYaml)
    assert repr(loaded.otrt) == repr(wrapped.otrt)
    assert not differ(weights(loaded), weights(wrapped))


EXAMPLES = Path(__file__).parents[2] / "examples" / "cli"
CHOSEN = {
    "torchvision": {"net.layer3": "layer3", "net.layer4": "layer4"},
    "timm": ["net.act1", "net.layer1", "net.layer2", "net.layer3", "net.layer4"],
    "hugging_face": {
        **{f"net.vit.layers.{block}": f"vit.layers.{2 * block + 1}" for block in range(4)},
        "net.classifier:input": "classifier:input",
    },
}


def run_file(path: Path, *arguments: str) -> Any:
    return cli.LightningCLI(
        args=[
            "fit",
            f"--config={path}",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            *arguments,
        ],
        save_config_callback=None,
        subclass_mode_model=True,
        subclass_mode_data=True,
    )


def test_every_file_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(CHOSEN)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_the_files_of_the_examples(tmp_path, name):
    """Students of torchvision, timm and Hugging Face as they are in the gallery, on fewer images."""
    pytest.importorskip({"hugging_face": "transformers"}.get(name, name))
    small = ["--data.init_args.count=16", "--data.init_args.batch_size=8", f"--trainer.default_root_dir={tmp_path}"]
    found = run_file(EXAMPLES / f"{name}.yaml", *small)
    (callback,) = [c for c in found.trainer.callbacks if isinstance(c, OTRTCallback)]
    pairs = [(pair.student, pair.teacher) for pair in callback.transfer.pairs]
    if name == "hugging_face" and hasattr(found.model.net.vit, "encoder"):
        # Before transformers 5 the blocks lay one deeper.
        pairs = [tuple(side.replace("vit.encoder.layer.", "vit.layers.") for side in pair) for pair in pairs]
    # What "matched" chooses for untrained networks is not told, but that every block of the student has a partner.
    assert [*CHOSEN[name]] == [student for student, _ in pairs]
    assert isinstance(CHOSEN[name], list) or [*CHOSEN[name].items()] == pairs
    assert found.trainer.global_step == 2
    assert float(found.trainer.callback_metrics["train/otrt"]) > 0
    assert 0 <= float(found.trainer.callback_metrics["val/accuracy"]) <= 1
    assert not hooks(found.model)


def test_a_pretrained_teacher_of_hugging_face(tmp_path):
    """The form that a comment in the file gives, with a folder in place of a name on the hub."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=64, patch_size=16, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "teacher")
    text = yaml.safe_load((EXAMPLES / "hugging_face.yaml").read_text())
    text["trainer"]["callbacks"][0]["init_args"]["teacher"] = {
        "class_path": "examples.cli.classifier.pretrained",
        "init_args": {"name": str(tmp_path / "teacher")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(text))
    found = run_file(tmp_path / "config.yaml", "--trainer.fast_dev_run=true")
    assert found.trainer.callbacks[0].transfer.teacher.module.config.hidden_size == 24


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"weigth": 1.0}, "'weigth' is not accepted"),
        (True, "distillation"),
        ("much", "distillation"),
        ([1], "distillation"),
    ],
)
def test_distillation_that_is_none(tmp_path, capsys, option, said):
    with pytest.raises(SystemExit):
        run(tmp_path, {"teacher": NET, "distillation": option})
    assert said in capsys.readouterr().err
