"""Pages of results: each benchmark writes one, stamped with the code that it measured.

``python -m benchmarks.pages`` lists the pages whose code has changed since. ``--mark`` writes that on the pages, and
``--check`` fails where a page does not say it.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.sources import changed, hashes

__all__ = ["RESULTS", "check", "here", "mark", "stamp", "write_page"]

#: Where pages, their data and their figures are.
RESULTS = Path(__file__).parent / "results"
#: Stamps and hashes of the measured code, by page.
RECORDS = "sources.json"
_STALE = "*Stale: since then "
#: Files that a page names; the others it counts.
_NAMED = 3


def write_page(page: str, folder: Path = RESULTS, *, measured: bool = True, where: str = "") -> Path:
    """Write a page under the name of its title.

    Args:
        page: Markdown that starts with ``# Title``.
        folder: Where it goes.
        measured: Whether all its numbers come from the code as it is. If not, the page keeps the stamp that it had.
        where: Commit, day and machine of numbers that come from another machine, in place of those of this one.

    Returns:
        The file, such as ``results/fixed_views.md`` for ``# Fixed views``.
    """
    title = page.splitlines()[0]
    if not title.startswith("# "):
        raise ValueError(f"Expected a page that starts with '# Title', but got {title!r}.")
    name = re.sub(r"[^a-z0-9]+", "_", title[2:].lower()).strip("_")
    records = _read(folder)
    if measured or name not in records:
        records[name] = {"stamp": stamp(where), "files": hashes(name)}
        (folder / RECORDS).write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
    path = folder / f"{name}.md"
    path.write_text(f"{page.rstrip()}\n\n{_ending(name, records[name])}\n")
    return path


def stamp(where: str = "") -> str:
    """Commit, day and machine, as the last line of a page."""
    return f"*Measured at {where or here()}.*"


def here() -> str:
    """The code as it is, today and this machine."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"], capture_output=True, text=True, check=False
    )
    commit = found.stdout.strip() or "unknown"
    return f"commit {commit} on {date.today()}; {_processor()}, torch {torch.__version__}"


def stale(folder: Path = RESULTS) -> dict[str, list[str]]:
    """By page, the files that changed since it was measured. Pages that are up to date are left out."""
    files = {name: changed(name, record["files"]) for name, record in _read(folder).items()}
    return {name: names for name, names in files.items() if names}


def check(folder: Path = RESULTS) -> list[str]:
    """What is wrong: pages that are stale and do not say so, and pages without a record."""
    unknown = sorted({path.stem for path in folder.glob("*.md")} - _read(folder).keys())
    problems = [f"{name}.md has no record in {RECORDS}: write it with `write_page`." for name in unknown]
    for name, files in stale(folder).items():
        if _STALE not in (folder / f"{name}.md").read_text():
            problems.append(
                f"{name}.md is older than {_listed(files)}. Measure again, or run `python -m benchmarks.pages --mark`, "
                "which writes on the page that it is stale."
            )
    return problems


def mark(folder: Path = RESULTS) -> None:
    """Write on each page whether it is stale."""
    for name, record in _read(folder).items():
        path = folder / f"{name}.md"
        text, found, _ = path.read_text().partition(record["stamp"])
        if not found:
            raise ValueError(
                f"{path.name} does not end with its stamp {record['stamp']!r}: write it with `write_page`."
            )
        path.write_text(f"{text}{_ending(name, record)}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Report, mark or check the pages; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fail where a stale page does not say so")
    what.add_argument("--mark", action="store_true", help="write on each page whether it is stale")
    options = parser.parse_args(arguments)
    if options.mark:
        mark()
    lines = check() if options.check else [f"{name}.md: {_listed(files)}" for name, files in stale().items()]
    print("\n".join(lines) or "All pages are up to date, or say that they are not.")
    return int(options.check and bool(lines))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RECORDS
    records: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return records


def _ending(name: str, record: dict[str, Any]) -> str:
    files = changed(name, record["files"])
    note = f"\n{_STALE}{_listed(files)} changed; see `python -m benchmarks.pages`.*" if files else ""
    return f"{record['stamp']}{note}"


def _listed(files: Sequence[str]) -> str:
    more = len(files) - _NAMED
    return ", ".join(f"`{file}`" for file in files[:_NAMED]) + (f" and {more} more files" if more > 0 else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    raise SystemExit(main())
