"""Counts the cases of the tests, for the table in tests/README.md: ``python tests/counts.py``."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

FOLDERS = ["tests", "lightning_otrt", "benchmarks/tests"]
#: What is counted: a name, and what the names of its tests begin with.
COUNTED = {
    "bad inputs and their defined outcomes": ["tests/bad_inputs/"],
    "contexts of a fit": ["tests/trainer/test_contexts.py"],
    "strategies and distributed runs": [
        "tests/trainer/test_strategies.py",
        "tests/steps/test_global_engine.py",
        "tests/steps/test_global_numbers.py",
    ],
    "demo modules with callbacks of Lightning": ["tests/trainer/test_lightning_callbacks.py"],
    "soak": ["tests/trainer/test_soak.py"],
    "chains of killed runs": ["tests/trainer/test_kills.py"],
    "fuzzed properties": ["tests/test_fuzz.py"],
    "packaging": ["tests/test_packaging.py", "tests/test_architecture.py"],
    "benchmarks": ["benchmarks/tests/"],
    "all": [""],
}


def collected(marks: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", marks, *FOLDERS]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if "::" in line]


def main() -> None:
    names = {marks: collected(marks) for marks in ("not slow", "slow")}
    counts = {
        marks: Counter(kind for kind, starts in COUNTED.items() for line in lines if line.startswith(tuple(starts)))
        for marks, lines in names.items()
    }
    for kind in COUNTED:
        print(f"| {kind} | {counts['not slow'][kind]} | {counts['slow'][kind]} |")


if __name__ == "__main__":
    main()
