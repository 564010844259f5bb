"""The code that each page of results measures, and a hash of it that comments and docstrings leave alone."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["ROOT", "SOURCES", "changed", "hashes"]

ROOT = Path(__file__).parents[1]
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
#: The term of the loss: costs and plans, and when they are solved.
_ENGINE = ("lightning_otrt/transport", "lightning_otrt/steps")
#: The same from the outputs of layers on.
_TERM = (*_ENGINE, "lightning_otrt/reading")
_LETTERS = ("examples/glyphs.py", "examples/networks.py")
_TRAINING = tuple(
    f"benchmarks/evidence/{name}.py" for name in ("experiments", "methods", "networks", "runs", "training", "tuning")
)
#: By page: files, and folders with all their files.
SOURCES: dict[str, tuple[str, ...]] = {
    "distributed": (*_ENGINE, "benchmarks/distributed.py"),
    "efficiency": (*_TERM, *_LETTERS, "benchmarks/efficiency.py"),
    "fixed_views": (
        *_TERM,
        *_LETTERS,
        "lightning_otrt/fixed_views.py",
        "benchmarks/efficiency.py",
        "benchmarks/fixed_views.py",
    ),
    "gpu": (
        *_TERM,
        "lightning_otrt/teacher",
        *(f"benchmarks/{name}.py" for name in ("gpu", "gpu_runs", "problems", "rivals", "steps")),
    ),
    "layers_and_plans_on_real_checkpoints": (*_TERM, "lightning_otrt/layers", "benchmarks/real"),
    "launches": (*_ENGINE, "benchmarks/launches.py"),
    "weight_on_real_checkpoints": (
        *_TERM,
        "lightning_otrt/layers",
        "lightning_otrt/analysis/weight.py",
        "benchmarks/real",
    ),
    "real_checkpoints": (*_TERM, "lightning_otrt/layers", *_TRAINING, "benchmarks/real"),
    "repeated_runs": (
        *_TERM,
        "lightning_otrt/layers",
        *_LETTERS,
        "examples/digits.py",
        *_TRAINING,
        "benchmarks/real",
        "benchmarks/repeat.py",
    ),
    "speed": (
        *_ENGINE,
        *(f"benchmarks/{name}.py" for name in ("orthogonal", "problems", "rivals", "speed", "steps", "timing")),
    ),
    "teacher_cache": (
        *_TERM,
        "lightning_otrt/teacher",
        "benchmarks/teacher_cache.py",
        "benchmarks/timing.py",
        "benchmarks/real/checkpoints.py",
        "benchmarks/real/networks.py",
    ),
    "transfer": (*_TERM, "lightning_otrt/layers", *_LETTERS, "examples/digits.py", *_TRAINING),
    "two_versions": (
        *_ENGINE,
        "benchmarks/problems.py",
        "benchmarks/timing.py",
        "benchmarks/versions.py",
        "benchmarks/versions_worker.py",
    ),
    "weight": (
        *_TERM,
        *_LETTERS,
        "examples/digits.py",
        "lightning_otrt/analysis/gradient_share.py",
        "lightning_otrt/analysis/weight.py",
        "benchmarks/efficiency.py",
        "benchmarks/weight.py",
    ),
}


def hashes(page: str, root: Path = ROOT) -> dict[str, str]:
    """A hash of each file that a page depends on.

    Args:
        page: Name of the page, such as ``"speed"``.
        root: The checkout.

    Raises:
        ValueError: If the page has no sources.
    """
    if page not in SOURCES:
        raise ValueError(f"The page {page!r} has no sources. Add what it measures to SOURCES in benchmarks/sources.py.")
    return {str(path.relative_to(root)): code_hash(path.read_text()) for path in _files(SOURCES[page], root)}


def changed(page: str, recorded: dict[str, str], root: Path = ROOT) -> list[str]:
    """The files of a page that differ from what was recorded, that are new and that are gone."""
    now = hashes(page, root)
    return sorted(name for name in now.keys() | recorded.keys() if now.get(name) != recorded.get(name))


def code_hash(text: str) -> str:
    """A hash of what Python code does: the same in all versions of Python, and for other comments and docstrings."""
    return hashlib.sha256("".join(_parts(ast.parse(text))).encode()).hexdigest()[:12]


def _files(paths: Iterable[str], root: Path) -> list[Path]:
    found: set[Path] = set()
    for path in paths:
        found |= {root / path} if path.endswith(".py") else set((root / path).rglob("*.py"))
    return sorted(found)


def _parts(value: object) -> Iterator[str]:
    """The tree as text. What is empty is left out: versions of Python differ in it, and ``ast.dump`` with them."""
    if isinstance(value, ast.AST):
        yield f"({type(value).__name__}"
        for name, part in ast.iter_fields(value):
            if name == "body" and isinstance(value, _DOCUMENTED) and ast.get_docstring(value, clean=False) is not None:
                part = part[1:]
            if part not in (None, []) and name not in ("kind", "type_comment"):
                yield f" {name}="
                yield from _parts(part)
        yield ")"
    elif isinstance(value, list):
        for part in value:
            if not (isinstance(part, ast.Constant) and part.value == ""):  # Python 3.12 adds some to f-strings
                yield from _parts(part)
    else:
        yield repr(value)
