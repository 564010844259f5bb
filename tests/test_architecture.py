"""The house: which file may import which, and what importing the package must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_otrt

PACKAGE = Path(lightning_otrt.__file__).parent
#: From the ground up; a file imports only from floors below its own.
FLOORS = (
    {"arguments", "collectives", "layers", "loading", "operations", "plans", "plotting", "schedules"},
    {"cost", "grammar", "neurons"},
    {"correlation", "euclidean"},
    {"costs", "states"},
    {"distance", "recording", "selection", "teachers", "tracing"},
    {"inspection", "matching", "metrics", "readings"},
    {"engine"},
    {"global_batch", "pairing"},
    {"agreement", "analysis"},
    {"transfer"},
    {"advice", "gradients", "validation"},
    {"figures", "patching", "strategies"},
    {"callback", "watching"},
    {"module", "monitor"},
)
#: The floors from here on know Lightning; those below are plain PyTorch.
LIGHTNING_FLOOR = 11


def _imports(path: Path) -> set[str]:
    """All modules that a file imports, also inside functions, but not for type checkers alone."""
    tree = ast.parse(path.read_text())
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    ]
    hidden = {id(child) for node in typing_only for child in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


MODULES = {path.stem: _imports(path) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def test_every_file_has_a_floor() -> None:
    assert set.union(*FLOORS) == set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_down_only(name: str) -> None:
    floor = next(index for index, names in enumerate(FLOORS) if name in names)
    below = set().union(*FLOORS[:floor])
    siblings = {module.split(".")[1] for module in MODULES[name] if module.startswith("lightning_otrt.")}
    assert siblings <= below
    if floor < LIGHTNING_FLOOR:
        assert not any(module.split(".")[0] == "lightning" for module in MODULES[name])


def test_one_file_imports_geomloss() -> None:
    assert [name for name, imports in MODULES.items() if any(m.split(".")[0] == "geomloss" for m in imports)] == [
        "plans"
    ]


@pytest.mark.parametrize("optional", ["ot", "matplotlib", "timm", "transformers", "pandas", "jsonargparse", "sklearn"])
def test_importing_pulls_in_nothing_optional(optional: str, imported: set[str]) -> None:
    assert optional not in imported


def test_importing_initialises_no_device(imported: set[str]) -> None:
    assert "CUDA IS INITIALISED" not in imported


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """What a fresh process has imported after ``import lightning_otrt``, beyond what Lightning itself imports."""
    code = (
        "import sys, torch, lightning, torchmetrics, geomloss; before = set(sys.modules); import lightning_otrt;"
        "print(*(set(sys.modules) - before), *['CUDA IS INITIALISED'] * torch.cuda.is_initialized(), sep='\\n')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split("\n"))
