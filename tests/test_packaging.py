"""What installers and importers see: versions, files, import time in modules, and checkpoints without pickles."""

from __future__ import annotations

import ast
import pickletools
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from helpers import LAYERS, loader, make_task, make_teacher, make_trainer
from packaging.requirements import Requirement
from packaging.version import Version

import lightning_otrt
from lightning_otrt import OTRTCallback

ROOT = Path(__file__).parent.parent
#: What a user gets with the package; everything else is an extra.
NEEDED = {
    *("torch", "torchvision", "lightning", "lightning-utilities", "geomloss", "torchmetrics", "numpy", "scipy"),
    *("safetensors", "tqdm", "typing-extensions"),
}


def needed() -> dict[str, Requirement]:
    lines = (Requirement(line) for line in metadata.requires("lightning_otrt") or [])
    return {line.name: line for line in lines if line.marker is None}


def test_dependencies() -> None:
    assert set(needed()) == NEEDED


@pytest.mark.parametrize(
    ("version", "allowed"), [("2.5.6", False), ("2.6.1", True), ("2.6.4", True), ("2.6.2", False), ("2.6.3", False)]
)
def test_compromised_releases_of_lightning_are_excluded(version: str, allowed: bool) -> None:
    assert needed()["lightning"].specifier.contains(version) == allowed


def test_geomloss_is_held_to_the_release_whose_private_loop_is_known() -> None:
    specifier = needed()["geomloss"].specifier
    assert specifier.contains("0.3.1")
    assert not specifier.contains("0.4.0")


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_what_is_installed_is_supported(name: str) -> None:
    assert needed()[name].specifier.contains(metadata.version(name), prereleases=True)


def test_version_and_types() -> None:
    assert metadata.version("lightning_otrt") == lightning_otrt.__version__
    assert Version(metadata.metadata("lightning_otrt")["Requires-Python"].removeprefix(">=")) == Version("3.10")
    assert (Path(lightning_otrt.__file__).parent / "py.typed").exists()


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """What a new process has imported after ``import lightning_otrt``, beyond what Lightning and torchvision import."""
    code = (
        "import sys, torch, lightning, torchvision; before = set(sys.modules); import lightning_otrt;"
        "print(*(set(sys.modules) - before), *['CUDA IS INITIALISED'] * torch.cuda.is_initialized(), sep='\\n')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not run.stderr
    found = {name.split(".")[0] for name in run.stdout.splitlines()}
    assert "lightning_otrt" in found
    return found


def test_importing_adds_few_modules(imported: set[str]) -> None:
    """The time over ``import lightning`` is that of our own files: `nox -s import_time` measures it."""
    added = imported - {"lightning_otrt"} - set(sys.stdlib_module_names)
    # Compiled parts of scipy go by private names of their own, which differ from release to release.
    added = {name for name in added if not name.startswith("_")}
    known = {"geomloss", "scipy", "tqdm", "numpy", "cython_runtime", "torch", "charset_normalizer", "safetensors"}
    assert added <= known


@pytest.mark.parametrize("optional", ["ot", "matplotlib", "timm", "transformers", "pandas", "jsonargparse", "sklearn"])
def test_importing_pulls_in_nothing_optional(optional: str, imported: set[str]) -> None:
    assert optional not in imported


def test_importing_initialises_no_device(imported: set[str]) -> None:
    assert "CUDA IS INITIALISED" not in imported


def test_checkpoints_hold_tensors_and_plain_values_alone(tmp_path: Path) -> None:
    """Nothing of ours is unpickled, and `weights_only=True` reads everything."""
    callback = OTRTCallback(make_teacher(), LAYERS, memory=0.9)
    trainer = make_trainer(callbacks=[callback])
    trainer.fit(make_task(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert kinds(state) <= {dict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        found = {str(argument) for code, argument, _ in pickletools.genops(archive.read(name)) if code.name == "GLOBAL"}
    assert found
    assert not [name for name in found if name.split()[0].split(".")[0] not in ("torch", "collections")]


def kinds(value: object) -> set[type]:
    if isinstance(value, dict):
        return set().union({dict}, *(kinds(part) for pair in value.items() for part in pair))
    if isinstance(value, (list, tuple)):
        return set().union({type(value)}, *(kinds(part) for part in value))
    return {type(value)}


def test_nothing_is_unpickled_by_the_package() -> None:
    """A file is opened with `weights_only=True` wherever the package opens one."""
    package = Path(lightning_otrt.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            assert ast.unparse(node.func) not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), path
            if ast.unparse(node.func) == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") in ("True", "weights_only"), f"{path}: {ast.unparse(node)}"


def test_supported_versions_are_those_of_the_metadata() -> None:
    """SECURITY.md tells users which versions are supported; the metadata enforces it."""
    text = (ROOT / "SECURITY.md").read_text()
    told = dict(re.findall(r"^\| (\w[\w-]*) \| (?:≥ )?([\d.]+)", text, re.MULTILINE))
    for name in ("torch", "torchvision", "lightning", "torchmetrics", "geomloss"):
        [lowest] = [s.version for s in needed()[name].specifier if s.operator == ">="]
        assert Version(told[name]) == Version(lowest)
    assert told["Python"] == "3.10"


def test_one_version_in_all_files() -> None:
    """The newest dated section of the changelog, and what is cited, are the version of the package."""
    dated = re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert dated[0] == (lightning_otrt.__version__, str(cited["date-released"]))
    assert cited["version"] == lightning_otrt.__version__


def test_the_changelog_keeps_a_section_for_what_comes_next() -> None:
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    versions = [Version(name) for name in headings[1:]]
    assert versions == sorted(versions, reverse=True)


def test_the_paper_is_what_is_cited() -> None:
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert paper["title"] == "Representation Transfer by Optimal Transport"
    assert [author["family-names"] for author in paper["authors"]] == ["Li", "Grandvalet", "Flamary", "Courty", "Dou"]
    assert paper["doi"].endswith("2007.06737")
