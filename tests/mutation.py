"""Mutates the mathematical core and counts the mutants that the tests notice: `nox -s mutation` runs it in a copy.

``python tests/mutation.py FOLDER [MUTANTS]`` mutates the copy of the repository in a folder, with at most so many
mutants of each file, drawn with a fixed seed (default 100; 0: all). mutmut runs only the tests that enter the mutated
function, and stops at the first that fails.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

#: What is mutated, without the ending, and what is run.
FILES = [
    *(f"transport/{name}" for name in ("cost", "correlation", "moments", "euclidean", "gradient", "distance")),
    *(f"transport/{name}" for name in ("sinkhorn", "plans", "orthogonal", "polar")),
    *(f"reading/neurons/{name}" for name in ("reader", "pooling")),
    *(f"reading/hooks/{name}" for name in ("view_hooks", "layer_hooks", "note_hooks", "step_mask", "recorder")),
]
TESTS = ["tests/transport", "tests/steps", "tests/reading", "tests/test_transfer.py"]
#: Peaks of memory are left out: the wrappers of mutmut hold arguments longer.
SETTINGS = f"""
[tool.mutmut]
source_paths = ["lightning_otrt"]
only_mutate = {[f"lightning_otrt/{name}.py" for name in FILES]}
also_copy = ["SECURITY.md", "conftest.py", "examples"]
pytest_add_cli_args = ["-p", "no:cacheprovider", "-m", "not slow", "-k", "not peak_memory",
    "--override-ini=addopts=--import-mode=importlib"]
pytest_add_cli_args_test_selection = {TESTS}
"""
#: What mutmut notes of a mutant that no test noticed; a time limit or a crash is noticed.
SURVIVED, UNTOUCHED = 0, 33


def noted(folder: Path, name: str) -> dict[str, int | None]:
    """What became of each mutant of a file."""
    found: dict[str, int | None] = json.loads((folder / f"mutants/lightning_otrt/{name}.py.meta").read_text())[
        "exit_code_by_key"
    ]
    return found


def mutate(folder: Path, mutants: list[str]) -> None:
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *mutants]
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)


def main(folder: Path, count: int) -> None:
    settings = folder / "pyproject.toml"
    if "[tool.mutmut]" not in settings.read_text():
        settings.write_text(settings.read_text() + SETTINGS)
    for name in FILES:
        if not (folder / f"mutants/lightning_otrt/{name}.py.meta").exists():
            mutate(folder, ["lightning_otrt.reading.masks.values.x_padding_mask*"])  # writes the list of all mutants
        mutants = sorted(noted(folder, name))
        chosen = mutants if not count else random.Random(0).sample(mutants, min(count, len(mutants)))
        mutate(folder, [mutant for mutant in chosen if noted(folder, name)[mutant] is None] or chosen[:1])
        codes = {mutant: noted(folder, name)[mutant] for mutant in chosen}
        survivors = [mutant for mutant, code in codes.items() if code in (SURVIVED, UNTOUCHED)]
        killed = len(codes) - len(survivors)
        print(f"{name}: {killed} of {len(codes)} killed ({killed / len(codes):.0%}), {len(mutants)} mutants in all")
        print(*(f"  {mutant}" for mutant in sorted(survivors)), sep="\n", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 100)
