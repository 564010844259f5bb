"""Which file may import which, how long files are, and that what is said of the tree is so."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from counts import COUNTED
from mutation import FILES, TESTS

import lightning_otrt

ROOT = Path(__file__).parents[1]
PACKAGE = Path(lightning_otrt.__file__).parent
#: What a floor may import, besides itself and what these may. Single files between the floors count as floors.
BELOW = {
    "checks": set(),
    "random_numbers": set(),
    "schedules": {"checks"},
    "fixed_views": {"checks", "random_numbers"},
    "distillation": {"checks"},
    "transport": {"checks", "random_numbers"},
    "notices": set(),
    "steps": {"transport", "notices"},
    "layers": {"checks"},
    "reading": {"layers", "transport", "notices"},
    "teacher": {"reading", "distillation"},
    "options": {"teacher", "schedules"},
    "processes": {"steps"},
    "missed_layers": {"reading"},
    "run_state": {"processes", "missed_layers", "teacher"},
    "weights": {"schedules"},
    "terms": {"run_state", "weights"},
    "recording": {"teacher", "weights"},
    "transfer": {"options", "recording", "terms"},
    "analysis": {"transfer"},
    "trainer": {"analysis"},
}
#: The rooms of a floor, in the order in which they build on each other. Single files between them count as rooms.
ROOMS = {
    "reading": [
        "containers",
        "torch_internals",
        "extra_forwards",
        "neurons",
        "traced",
        "masks",
        "probes",
        "trace_hooks",
        "tracer",
        "hooks",
        "student_root",
        "warnings",
        "chance",
        "closest",
        "pairing",
    ],
    "teacher": [
        "loading",
        "dtypes",
        "host_copy",
        "frozen",
        "cache",
        "class_names",
        "logit_makers",
        "task_gradient",
        "logit_choice",
        "logit_recording",
        "identities",
        "replaced",
        "teacher_run",
        "watched_layers",
        "pair_choice",
        "attachment",
    ],
}
#: Lines of one file.
LONGEST = 400


def _may_import(floor: str) -> set[str]:
    return {floor}.union(*(_may_import(below) for below in BELOW[floor]))


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


PATHS = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
MODULES = {name: _imports(path) for name, path in PATHS.items() if name != "__init__"}


def test_every_file_has_a_floor() -> None:
    assert {name.split(".")[0] for name in MODULES} == set(BELOW)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_down_only(name: str) -> None:
    floor = name.split(".")[0]
    imported = {module.split(".")[1] for module in MODULES[name] if module.startswith("lightning_otrt.")}
    assert imported <= _may_import(floor)
    assert "lightning_otrt" not in MODULES[name], "import from the file that defines a name, not from the package"


@pytest.mark.parametrize("floor", sorted(ROOMS))
def test_rooms_of_a_floor_build_on_those_before(floor: str) -> None:
    place = {room: index for index, room in enumerate(ROOMS[floor])}
    names = [name for name in MODULES if name.startswith(f"{floor}.") and not name.endswith("__init__")]
    assert {name.split(".")[1] for name in names} == set(place)
    for name in names:
        imported = {module.split(".")[2] for module in MODULES[name] if module.startswith(f"lightning_otrt.{floor}.")}
        assert not [room for room in imported if place[room] > place[name.split(".")[1]]], name


def test_no_circle_within_a_floor() -> None:
    graph = {
        name: {module.removeprefix("lightning_otrt.") for module in imports if module.startswith("lightning_otrt.")}
        for name, imports in MODULES.items()
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", sorted(PATHS))
def test_length(name: str) -> None:
    assert len(PATHS[name].read_text().splitlines()) <= LONGEST


def test_only_the_trainer_floor_knows_lightning() -> None:
    outside = [name for name in MODULES if not name.startswith("trainer.")]
    assert not [name for name in outside if any(module.split(".")[0] == "lightning" for module in MODULES[name])]


def test_one_file_imports_geomloss() -> None:
    importers = [name for name, imports in MODULES.items() if any(m.split(".")[0] == "geomloss" for m in imports)]
    assert importers == ["transport.geomloss_loop"]


def test_every_file_that_the_page_of_the_architecture_names_is_there() -> None:
    page = ROOT.joinpath("docs/architecture.md").read_text()
    named = set(re.findall(r"`(?:lightning_otrt/)?((?:\w+/)*\w+\.py|\w+/)`", page)) - {"tests/test_architecture.py"}
    assert not [name for name in sorted(named) if not (PACKAGE / name).exists()]
    assert not [floor for floor in BELOW if not {f"{floor}/", f"{floor}.py"} & named], "each floor is named"


def test_the_page_of_the_architecture_names_every_file() -> None:
    """By itself or by its folder; a floor with rooms has to name each of its rooms."""
    page = ROOT.joinpath("docs/architecture.md").read_text()
    named = set(re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", page)) - {f"{floor}/" for floor in ROOMS}
    files = [path.relative_to(PACKAGE) for path in PATHS.values() if path.name != "__init__.py"]
    places = {file: {file.as_posix(), *(f"{folder.as_posix()}/" for folder in file.parents)} for file in files}
    assert not [file for file in files if not places[file] & named]


def test_names_in_the_docs_are_exported() -> None:
    """What a page for users mentions can be imported from `lightning_otrt`."""
    defined = {
        node.name
        for path in PATHS.values()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    }
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    pages.remove(ROOT / "docs" / "architecture.md")
    text = "\n".join(page.read_text() for page in pages)
    mentioned = set(re.findall(r"`(?:lightning_otrt\.)?(\w+)(?:\([^`]*\))?`", text)) & defined
    assert "OTRTCallback" in mentioned
    assert mentioned <= set(lightning_otrt.__all__)


def test_what_the_counts_and_the_mutants_name_is_there() -> None:
    named = [*TESTS, *(f"lightning_otrt/{name}.py" for name in FILES)]
    named += [path for paths in COUNTED.values() for path in paths]
    assert not [path for path in named if not (ROOT / path).exists()]


def test_no_probe_takes_want_of_memory_for_an_answer() -> None:
    """Forwards that only look at a network may fail, and then show nothing; but for want of memory they raise."""
    seen = 0
    for path in sorted((PACKAGE / "reading" / "probes").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            caught = (
                [ast.unparse(each.type) for each in node.handlers if each.type] if isinstance(node, ast.Try) else []
            )
            if "Exception" in caught:
                seen += 1
                assert caught[0] == "torch.OutOfMemoryError", f"{path.name}, line {node.lineno}"
    assert seen > 5
