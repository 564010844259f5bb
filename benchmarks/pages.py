"""Pages of results: each benchmark writes one, stamped with the code that it measured."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import date
from pathlib import Path

import torch

__all__ = ["RESULTS", "stamp", "write_page"]

#: Where pages, their data and their figures are.
RESULTS = Path(__file__).parent / "results"


def write_page(page: str, folder: Path = RESULTS) -> Path:
    """Write a page under the name of its title.

    Args:
        page: Markdown that starts with ``# Title``.
        folder: Where it goes.

    Returns:
        The file, such as ``results/fixed_views.md`` for ``# Fixed views``.
    """
    title = page.splitlines()[0]
    if not title.startswith("# "):
        raise ValueError(f"Expected a page that starts with '# Title', but got {title!r}.")
    path = folder / f"{re.sub(r'[^a-z0-9]+', '_', title[2:].lower()).strip('_')}.md"
    path.write_text(f"{page.rstrip()}\n\n{stamp()}\n")
    return path


def stamp() -> str:
    """Commit, day and machine, as the last line of a page."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"], capture_output=True, text=True, check=False
    )
    commit = found.stdout.strip() or "unknown"
    return f"*Measured at commit {commit} on {date.today()}; {_processor()}, torch {torch.__version__}.*"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
